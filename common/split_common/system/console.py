"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys

from rich.console import Console

#: Progress, notices and errors; stdout is for results only. Text from a model or a peer is not read as markup.
stderr = Console(stderr=True, highlight=False, markup=False, emoji=False)


def stdout() -> Console:
    """A console for results that are tables or lists. Not kept, because `sys.stdout` may be redirected."""
    return Console(highlight=False, markup=False, emoji=False)


def emit_json(obj: object) -> None:
    """Prints an object as one line of JSON on stdout."""
    print(json.dumps(obj, ensure_ascii=False), file=sys.stdout, flush=True)

"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys

from rich.console import Console

#: Progress, notices and errors; stdout is for results alone. What a model or a peer said is never taken for markup.
stderr = Console(stderr=True, highlight=False, markup=False, emoji=False)


def stdout() -> Console:
    """For results that are tables or lists; made anew, so that it writes to what stdout is now."""
    return Console(highlight=False, markup=False, emoji=False)


def emit_json(obj: object) -> None:
    """Print `obj` as one line of JSON on stdout."""
    print(json.dumps(obj, ensure_ascii=False), file=sys.stdout, flush=True)

"""What may be asked for, by the names that vLLM has, without importing torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

from split_common.errors import ConfigError

#: No drafts; and drafts only of as many tokens as pay.
OFF = "off"
AUTO = "auto"

#: All that may be asked for: these two, and the names of the drafters.
Speculate = Literal["auto", "off", "ngram", "suffix", "recycle", "suffix-recycle"]
SPECULATE: tuple[str, ...] = get_args(Speculate)


def check_speculate(name: str, names: Collection[str] = SPECULATE) -> str:
    """The name. Raises ConfigError if it is not among `names`."""
    if name not in names:
        raise ConfigError(f"invalid speculate {name!r}: expected one of {', '.join(names)}")
    return name

"""The drafters that there are, by name."""

from __future__ import annotations

from collections.abc import Callable

from split_common.errors import ConfigError
from split_device.speculation.drafter import Drafter
from split_device.speculation.ngram import NgramDrafter

#: What else may be asked for instead of a drafter: none, or one that drafts only as many tokens as pay.
OFF = "off"
AUTO = "auto"

#: The drafter of `AUTO`.
DRAFTER_OF_AUTO = "ngram"

#: Makes a drafter for one request, by its name.
DRAFTERS: dict[str, Callable[[], Drafter]] = {"ngram": NgramDrafter}


def make_drafter(name: str) -> Drafter:
    """A drafter for one request. Raises ConfigError if there is none of this name."""
    if (make := DRAFTERS.get(name)) is None:
        raise ConfigError(f"there is no drafter {name!r}: expected one of {', '.join(DRAFTERS)}")
    return make()


def check_speculate(name: str) -> str:
    """The name, if it may be asked for. Raises ConfigError if not."""
    names = [AUTO, OFF, *DRAFTERS]
    if name not in names:
        raise ConfigError(f"invalid speculate {name!r}: expected {', '.join(names[:-1])} or {names[-1]}")
    return name

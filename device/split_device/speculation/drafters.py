"""The drafters that there are, by name."""

from __future__ import annotations

from collections.abc import Callable

from split_common.errors import ConfigError
from split_device.speculation.drafter import Drafter
from split_device.speculation.ngram import NgramDrafter

#: Makes a drafter for one request, by its name.
DRAFTERS: dict[str, Callable[[], Drafter]] = {"ngram": NgramDrafter}


def make_drafter(name: str) -> Drafter:
    """A drafter for one request. Raises ConfigError if there is none of this name."""
    if (make := DRAFTERS.get(name)) is None:
        raise ConfigError(f"there is no drafter {name!r}: expected one of {', '.join(DRAFTERS)}")
    return make()

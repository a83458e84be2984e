"""The drafters that there are, by name."""

from __future__ import annotations

from collections.abc import Callable

from split_device.speculation.drafter import Drafter
from split_device.speculation.names import AUTO, OFF, check_speculate
from split_device.speculation.ngram import NgramDrafter

#: Makes a drafter for one request, by its name, which is in `names.Speculate`, too.
DRAFTERS: dict[str, Callable[[], Drafter]] = {"ngram": NgramDrafter}

#: The drafter of `AUTO`.
DRAFTER_OF_AUTO = "ngram"


def make_drafter(name: str) -> Drafter:
    """A drafter for one request, by its name or `auto`. Raises ConfigError if there is none of this name."""
    return DRAFTERS[check_speculate(DRAFTER_OF_AUTO if name == AUTO else name, DRAFTERS)]()


def check_choice(name: str) -> str:
    """What a request asks for, if it is `auto`, `off` or a drafter that there is. Raises ConfigError if not."""
    return check_speculate(name, [AUTO, OFF, *DRAFTERS])

"""Limits of what one process runs at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from split_device.speculation.names import AUTO

#: Default of `Limits.prefix_cache`.
PREFIX_CACHE = 1024**3


@dataclass(frozen=True)
class Limits:
    """How much one process runs at once.

    Args:
        requests: generations (or jobs) at once; further ones wait.
        kv_memory: bytes for the keys and values of each model's head and tail; 1 GiB if None.
        images: images at once.
        prefix_cache: bytes that each model keeps of ended requests, for later ones that begin alike; 0 for none.
            It is part of `kv_memory` for the most part, where requests that run go first.
        speculate: what drafts tokens of requests that do not say: `auto`, `off`, or the name of a drafter.
        steps_ahead: most steps of a request that are sent before the one in front of them is back; 0 for none. Over
            a slow network 3 makes long passages faster that drafts copy.
    """

    requests: int = 64
    kv_memory: int | None = None
    images: int = 2
    prefix_cache: int = PREFIX_CACHE
    speculate: str = AUTO
    steps_ahead: int = 0

    def but(self, **changed: int | str | None) -> Limits:
        """The same limits with others in place of some; None leaves one as it is."""
        given: dict[str, Any] = {name: value for name, value in changed.items() if value is not None}
        return replace(self, **given)


#: For one request at a time.
ONE_ANSWER = Limits(requests=1)

"""What one call of a session sends: requests that are all there, or that come while others are away."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from split_common.protocol import payloads

#: A request and its tensors' bytes.
Request = tuple[payloads.Payload, memoryview | bytes]

#: A worker's answer to one request, and its tensor's bytes.
Reply = tuple[payloads.AnyReply, memoryview]


class Requests(Protocol):
    """The requests of a call, in order."""

    #: Whether requests may come while the call waits.
    growing: bool

    @property
    def complete(self) -> bool:
        """Whether all requests were taken."""

    def take(self, wait: bool) -> Request | None:
        """The next request; None if there is none now.

        Args:
            wait: whether to wait for it.

        Raises:
            SplitError: no further one will come, although some are missing.
        """

    def answered(self, index: int, reply: Reply) -> None:
        """Takes the answer, no refusal, to the request of this index. Called in the order of requests."""


class GrowingStep(Protocol):
    """A step whose tokens come while it is under way."""

    def requests(self) -> Requests:
        """All its requests from the first one on, for a worker that has none of them."""


class AllRequests:
    """Requests that are there when the call begins."""

    growing = False

    def __init__(self, requests: Iterable[Request]) -> None:
        self._waiting = deque(requests)

    @property
    def complete(self) -> bool:
        return not self._waiting

    def take(self, wait: bool) -> Request | None:
        return self._waiting.popleft()

    def answered(self, index: int, reply: Reply) -> None:
        """All answers are what the call returns."""

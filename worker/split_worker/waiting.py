"""The requests that wait to be computed, and the bytes that they hold, by member."""

from __future__ import annotations

from typing import Any

from split_common.trust.shares import Usage
from split_worker.requests import Closed, PendingRequest
from split_worker.sessions import Session


class WaitingRequests:
    """Counts requests until they are answered, and lets go of those whose session is closed before they begin.

    Used under the worker's lock, by the link's thread also while a forward runs.
    """

    def __init__(self) -> None:
        self._bytes = Usage()
        #: The requests of each session that have not begun.
        self._by_session: dict[Session[Any], list[PendingRequest]] = {}

    @property
    def total(self) -> int:
        """Bytes of all requests that wait."""
        return self._bytes.total

    def is_full(self, member: str, size: int, most: int) -> bool:
        """Whether the queue is full, and has so much of the member that another `size` bytes exceed its share.

        Other members may still add to a full queue, each as much as its share.

        Args:
            member: whose bytes they are.
            size: of the request that would be added.
            most: bytes above which the queue is full.
        """
        if self._bytes.total + size <= most:
            return False
        return self._bytes[member] + size > self._bytes.level(most, member, size)

    def add(self, request: PendingRequest) -> None:
        """Counts a request that has arrived."""
        self._by_session.setdefault(request.session, []).append(request)
        self._bytes.add(request.session.member, request.queued_bytes)

    def begin(self, request: PendingRequest) -> memoryview:
        """The bytes of a request's tensors; from now on it is not let go. Raises Closed if it was."""
        if request.released:
            raise Closed
        self._forget(request)
        return request.tensor

    def answered(self, request: PendingRequest) -> None:
        """Counts a request no more."""
        if request.released:
            return
        self._forget(request)
        self._bytes.add(request.session.member, -request.queued_bytes)

    def release(self, session: Session[Any]) -> None:
        """Lets go of the requests of a closed session that have not begun, with their bytes."""
        for request in self._by_session.pop(session, ()):
            self._bytes.add(session.member, -request.queued_bytes)
            request.release()

    def _forget(self, request: PendingRequest) -> None:
        waiting = self._by_session.get(request.session, [])
        if request in waiting:
            waiting.remove(request)
            if not waiting:
                del self._by_session[request.session]

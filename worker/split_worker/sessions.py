"""The worker's sessions: the keys and state of each, its next request, and which session is evicted first."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from split_common.errors import Busy, OutOfOrder
from split_common.protocol import headers
from split_common.protocol.channel import Channel, SessionKeys
from split_worker.bodies.base import SessionState
from split_worker.limits import WorkerLimits

#: Most requests of one session that may wait. A device does not send more before it gets answers.
MAX_WAITING = 256

#: The device's peer id, and the numbers of the channel, the session and the epoch.
SessionId = tuple[bytes, int, int, int]
#: A reply as it was sent: its header and its sealed body.
Frames = tuple[headers.Relay, bytes]

_State = TypeVar("_State", bound=SessionState)


@dataclass(eq=False)
class Session(Generic[_State]):
    """A generation, or the images of one device: the protocol's state and the body's."""

    id: SessionId
    keys: SessionKeys
    #: The body's state.
    state: _State
    #: Number in the order of opening, because the newest session is evicted first.
    age: int = 0
    #: Sequence number of the next request.
    expected: int = 0
    #: Number of requests that were answered.
    done: int = 0
    #: Replies by sequence number, until they are acknowledged.
    replies: dict[int, Frames] = field(default_factory=dict)
    #: When the last request came, by the monotonic clock.
    used: float = field(default_factory=time.monotonic)

    def admit(self, seq: int) -> bool:
        """Whether a request is the next one, and so must be computed. If not, it has come before.

        Raises:
            OutOfOrder: an earlier request has not arrived, or too many wait.
        """
        self.used = time.monotonic()
        if seq < self.expected:
            return False
        if seq > self.expected or self.expected - self.done >= MAX_WAITING:
            raise OutOfOrder(f"request {seq} of a session that expects {self.expected}")
        self.expected += 1
        return True

    def answered(self, frames: Frames) -> None:
        """Keeps a reply until it is acknowledged."""
        self.replies[frames[0].seq] = frames
        self.done += 1
        if len(self.replies) > MAX_WAITING:
            # A device has at most this many requests in flight, so that it no longer needs the oldest reply.
            del self.replies[next(iter(self.replies))]

    def forget(self, acked: int) -> None:
        """Drops the replies below a sequence number, which the device has."""
        for seq in [seq for seq in self.replies if seq < acked]:
            del self.replies[seq]

    def free(self) -> None:
        """Frees the memory of its state."""
        self.state.free()


class SessionTable:
    """All sessions of a worker. Used under the worker's lock.

    Closed sessions wait in `closed` until the compute loop's thread frees them.
    """

    def __init__(self, limits: WorkerLimits | None = None) -> None:
        self.limits = limits or WorkerLimits()
        self._sessions: dict[SessionId, Session[Any]] = {}
        self._ages = itertools.count()
        #: Closed sessions that have not been freed.
        self.closed: deque[Session[Any]] = deque()
        #: Bytes of replies that were added after the last count.
        self._uncounted = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def room(self, free_tokens: int | None) -> int:
        """How many sessions may be opened, if need be by evicting idle ones.

        Args:
            free_tokens: tokens that fit into the free memory; None if sessions take no memory.
        """
        idle = sum(map(self._is_idle, self._sessions.values()))
        return max(idle, self._unused(free_tokens))

    def _unused(self, free_tokens: int | None) -> int:
        allowed = self.limits.max_sessions
        if free_tokens is not None:
            allowed = min(allowed, free_tokens // self.limits.growth)
        return max(0, allowed - len(self._sessions))

    def get(self, id_: SessionId) -> Session[Any] | None:
        return self._sessions.get(id_)

    def open(self, id_: SessionId, channel: Channel, state: _State, free_tokens: int | None) -> Session[_State]:
        """Opens a session.

        Args:
            id_: its id, which no open session has.
            channel: the channel whose keys it uses.
            state: a new state of the body.
            free_tokens: tokens that fit into the free memory after the first step; None if sessions take no memory.

        Raises:
            Busy: the worker is full.
        """
        self.free_idle()
        if self._unused(free_tokens) < 1 and len(self._sessions):
            # An idle session makes room for the device's next try.
            if (idle := self._idlest()) is not None:
                self.close(idle.id)
            raise Busy("the worker has no room for another session", retry_after=0.5)
        session = Session(id_, channel.session_keys(id_[2], id_[3]), state, next(self._ages))
        self._sessions[id_] = session
        return session

    def answered(self, session: Session[Any], frames: Frames) -> None:
        """Keeps a reply of a session, which may have to be sent again. Drops replies beyond `max_replies` bytes."""
        session.answered(frames)
        self._uncounted += len(frames[1])
        if self._uncounted > self.limits.count_replies_every:
            self._uncounted = kept = 0
            for each in sorted(self._sessions.values(), key=lambda session: session.used, reverse=True):
                kept += sum(len(body) for _, body in each.replies.values())
                if kept > self.limits.max_replies:
                    each.replies.clear()

    def victim(self, asking: Session[Any]) -> Session[Any] | None:
        """Chooses a session to evict for `asking`: an idle one, else the newest if it is newer than `asking`."""
        if (idle := self._idlest()) is not None and idle is not asking:
            return idle
        others = [
            session for session in self._sessions.values() if session is not asking and session.state.holds_memory
        ]
        newest = max(others, key=lambda session: session.age, default=None)
        return newest if newest is not None and newest.age > asking.age else None

    def _idlest(self) -> Session[Any] | None:
        longest = min(self._sessions.values(), key=lambda session: session.used, default=None)
        return longest if longest is not None and self._is_idle(longest) else None

    def _is_idle(self, session: Session[Any]) -> bool:
        return time.monotonic() - session.used > self.limits.evict_after

    def evict(self, session: Session[Any]) -> None:
        """Forgets a session, which the caller frees. Its device is told that it is lost when it sends a request."""
        del self._sessions[session.id]

    def close(self, id_: SessionId) -> None:
        """Closes a session, if there is one with this id."""
        session = self._sessions.pop(id_, None)
        if session is not None:
            self.closed.append(session)

    def close_where(self, condition: Callable[[SessionId], bool]) -> None:
        """Closes all sessions whose id meets a condition."""
        for id_ in [id_ for id_ in self._sessions if condition(id_)]:
            self.close(id_)

    def free_idle(self) -> None:
        """Closes sessions that have been idle for `idle_timeout` seconds."""
        now = time.monotonic()
        self.close_where(lambda id_: now - self._sessions[id_].used > self.limits.idle_timeout)

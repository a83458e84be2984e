"""The worker's sessions: the keys and state of each, its next request, and which session is evicted first."""

from __future__ import annotations

import itertools
import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from split_common.engine.sequences import KVSequence, KVStore
from split_common.errors import Busy, OutOfOrder
from split_common.protocol import headers
from split_common.protocol.channel import Channel, EpochKeys
from split_common.trust.limited_log import LimitedLog
from split_common.trust.shares import Usage
from split_worker.bodies.base import SessionState
from split_worker.limits import WorkerLimits

log = logging.getLogger(__name__)

#: Most requests of one session that may wait. A device does not send more before it gets answers.
MAX_WAITING = 256

#: How many refused sessions are remembered.
REFUSED = 256

#: Refuses a session, and says after how many seconds a device may try again.
NO_ROOM = "the worker has no room for another session"
FULL_RETRY = 0.5

#: The device's peer id, the channel's number, the session's key or number, and the epoch.
SessionId = tuple[bytes, int, headers.SessionRef, int]
#: A reply as it was sent: its header and its sealed body.
Frames = tuple[headers.Relay, bytes]

_State = TypeVar("_State", bound=SessionState)


@dataclass(eq=False)
class Session(Generic[_State]):
    """A generation, or the images of one device: the protocol's state and the body's."""

    id: SessionId
    #: The name in the device's certificate, by which shares are counted.
    member: str
    keys: EpochKeys
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
    #: Bytes of these replies.
    kept: int = 0
    #: When each of these replies was sent again, by the monotonic clock.
    repeated: dict[int, float] = field(default_factory=dict)
    #: When the last new request came or was answered, by the monotonic clock.
    used: float = field(default_factory=time.monotonic)

    #: Whether its device has finished with it, and it is held for copies alone.
    is_kept: bool = False

    @property
    def label(self) -> str:
        """How logs name it."""
        return headers.session_label(self.id[2])

    def admit(self, seq: int) -> bool:
        """Whether a request is the next one, and so must be computed. If not, it has come before.

        Raises:
            OutOfOrder: an earlier request has not arrived, or too many wait.
        """
        if seq < self.expected:
            return False
        if seq > self.expected or self.expected - self.done >= MAX_WAITING:
            raise OutOfOrder(f"request {seq} of a session that expects {self.expected}")
        self.used = time.monotonic()
        self.expected += 1
        return True

    def answered(self, frames: Frames) -> None:
        """Keeps a reply until it is acknowledged."""
        self.replies[frames[0].seq] = frames
        self.kept += len(frames[1])
        self.done += 1
        self.used = time.monotonic()
        if len(self.replies) > MAX_WAITING:
            # A device has at most this many requests in flight, so that it no longer needs the oldest reply.
            self._drop(next(iter(self.replies)))

    def forget(self, acked: int) -> None:
        """Drops the replies below a sequence number, which the device has."""
        for seq in [seq for seq in self.replies if seq < acked]:
            self._drop(seq)

    def _drop(self, seq: int) -> None:
        self.kept -= len(self.replies.pop(seq)[1])
        self.repeated.pop(seq, None)

    def free(self) -> None:
        """Frees the memory of its state."""
        self.state.free()


class SessionTable:
    """All sessions of a worker. Used under the worker's lock.

    Closed sessions wait in `closed` until the compute loop's thread frees them. If there is too little of
    something, sessions that are kept for copies give way first, then idle ones, and then those of the member that
    has the largest share of it.

    Args:
        limits: None for the default.
        store: the sessions' KV memory; None if they take none.
    """

    def __init__(self, limits: WorkerLimits | None = None, store: KVStore | None = None) -> None:
        self.limits = limits or WorkerLimits()
        self._store = store
        # Tokens of memory by which a session is expected to grow at least.
        self._growth = self.limits.growth + (store.sequence_tokens if store is not None else 0)
        self._sessions: dict[SessionId, Session[Any]] = {}
        self._ages = itertools.count()
        #: Says what becomes of sessions.
        self.log = LimitedLog(log)
        #: Closed sessions that have not been freed.
        self.closed: deque[Session[Any]] = deque()
        # Sessions, and bytes of kept replies, of each member.
        self._open = Usage()
        self._kept = Usage()
        #: Sessions that were refused lately. What their devices have sent behind the first request is yet to come.
        self.refused: deque[SessionId] = deque(maxlen=REFUSED)

    def __len__(self) -> int:
        return len(self._sessions)

    def room(self, free_tokens: int | None) -> int:
        """How many sessions may be opened, if need be by evicting idle ones.

        A worker that is full has room for one more if a member that has no session yet would get one.

        Args:
            free_tokens: tokens that fit into the free memory; None if sessions take no memory.
        """
        idle = sum(session.is_kept or self._is_idle(session) for session in self._sessions.values())
        return max(idle, self._unused(free_tokens)) or int(self._has_room_for_others())

    def _unused(self, free_tokens: int | None) -> int:
        allowed = self.limits.max_sessions
        if free_tokens is not None:
            allowed = min(allowed, (free_tokens + self._kept_tokens()) // self._growth)
        return max(0, allowed - len(self._sessions) + self.kept_sessions)

    def _has_room_for_others(self) -> bool:
        if len(self._sessions) >= self.limits.max_sessions:
            return any(count > 1 for count in self._open.of_all().values())
        return any(tokens > self._growth for tokens in self._tokens().values())

    def get(self, id_: SessionId) -> Session[Any] | None:
        return self._sessions.get(id_)

    def open(
        self, id_: SessionId, channel: Channel, state: _State, free_tokens: int | None, tokens: int = 0
    ) -> Session[_State]:
        """Opens a session.

        Args:
            id_: its id, which no open session has.
            channel: the channel whose keys it uses.
            state: a new state of the body.
            free_tokens: tokens that fit into the free memory now; None if sessions take no memory.
            tokens: tokens of its first step.

        Raises:
            Busy: the worker is full, and no member has a larger share of it than this one would have.
        """
        self.free_idle()
        member = channel.peer.name
        if self._sessions:
            if len(self._sessions) >= self.limits.max_sessions:
                self._close_one_for(member)
            if free_tokens is not None and not self._unused(free_tokens - tokens):
                self._check_memory(member, max(tokens, self._growth))
        session = Session(id_, member, channel.epoch_keys(id_[2], id_[3]), state, next(self._ages))
        self._sessions[id_] = session
        self._open.add(member, 1)
        self.log.info(member, "session %s of device %s opened", session.label, member)
        return session

    def _close_one_for(self, member: str) -> None:
        """Closes a session so that a member may open one. Raises Busy if none gives way."""
        victim = self._next_to_go()
        if victim is None and self._open[largest := self._open.largest() or member] > self._open[member] + 1:
            victim = max(
                (each for each in self._sessions.values() if each.member == largest), key=lambda each: each.age
            )
        if victim is None:
            raise Busy(NO_ROOM, retry_after=FULL_RETRY)
        self.close(victim.id)

    def _check_memory(self, member: str, tokens: int) -> None:
        """Raises Busy if a member's new session would get no memory, because no other has a larger share."""
        used = self._tokens()
        if max(used.values(), default=0) > used.get(member, 0) + tokens:
            # The compute loop evicts a session once the first step needs its memory.
            return
        if (idle := self._next_to_go()) is not None:
            # It makes room for the device's next try.
            self.close(idle.id)
        raise Busy(NO_ROOM, retry_after=FULL_RETRY)

    def _tokens(self) -> dict[str, int]:
        """Tokens that the sessions of each member hold in KV memory."""
        return {member: self._held(own) for member, own in _by_member(self._sessions.values()).items()}

    def _held(self, sessions: Iterable[Session[Any]]) -> int:
        return self._store.held_by(sequences_of(sessions)) if self._store is not None else 0

    def _freed(self, sessions: Iterable[Session[Any]]) -> int:
        return self._store.freed_by(sequences_of(sessions)) if self._store is not None else 0

    def answered(self, session: Session[Any], frames: Frames) -> None:
        """Keeps a reply of a session, which may have to be sent again.

        If all replies exceed `max_replies` bytes, the least recently used sessions of the member with the largest
        share lose theirs.
        """
        before = session.kept
        session.answered(frames)
        if self._sessions.get(session.id) is not session:
            return
        self._count_kept(session, before)
        while self._kept.total > self.limits.max_replies and (largest := self._kept.largest()) is not None:
            own = (each for each in self._sessions.values() if each.member == largest and each.kept)
            self._forget(min(own, key=lambda each: each.used), 2**62)

    def forget(self, session: Session[Any], acked: int) -> None:
        """Drops a session's replies below a sequence number, which the device has."""
        if self._sessions.get(session.id) is session:
            self._forget(session, acked)

    def _forget(self, session: Session[Any], acked: int) -> None:
        before = session.kept
        session.forget(acked)
        self._count_kept(session, before)

    def _count_kept(self, session: Session[Any], before: int) -> None:
        if more := session.kept - before:
            self._kept.add(session.member, more)

    def victims(self, asking: Session[Any], tokens: int = 0, own: bool = True) -> list[Session[Any]]:
        """Chooses sessions to evict for a step of `asking` that needs this many more tokens.

        That is one; or several that share all their memory, because one of them would free none. Those that are
        kept go first, then idle ones. Then the newest of the member that holds most, if that is more than the
        asking member would hold; or else the newest of the asking member, if they are newer than `asking`.

        Args:
            own: whether sessions of the asking member may go though they are neither kept nor idle.
        """
        for order in self._first_to_go():
            if chosen := self._freeing([each for each in order if each is not asking]):
                return chosen
        newest = sorted(self._sessions.values(), key=lambda each: each.age, reverse=True)
        others = _by_member(each for each in newest if each is not asking and each.state.holds_memory)
        member = asking.member
        mine = others.pop(member, [])
        if others:
            used = self._tokens()
            used[member] = used.get(member, 0) + tokens
            largest = max(used, key=lambda each: (used[each], each == member))
            if largest != member:
                return self._freeing(others[largest])
        return self._freeing([each for each in mine if each.age > asking.age]) if own else []

    def _freeing(self, order: list[Session[Any]]) -> list[Session[Any]]:
        """Of sessions, in the order in which they would go: the fewest first ones whose going frees memory.

        Only the last one of these, if that is enough. None if all together free nothing.
        """
        least = self._freed(self.closed) + 1
        few = bisect_left(
            range(len(order)), least, key=lambda last: self._freed([*self.closed, *order[: last + 1]])
        )
        if few == len(order):
            return []
        is_enough = self._freed([*self.closed, order[few]]) >= least
        return [order[few]] if is_enough else order[: few + 1]

    def _first_to_go(self) -> Iterator[list[Session[Any]]]:
        """Sessions that give way to any other: kept ones, of the member that keeps most first; then idle.

        Each list begins with the one that was used least recently.
        """
        kept = _by_member(session for session in self._sessions.values() if session.is_kept)
        idle = list(filter(self._is_idle, self._sessions.values()))
        for sessions in [*sorted(kept.values(), key=self._held, reverse=True), idle]:
            if sessions:
                yield sorted(sessions, key=lambda session: session.used)

    def _next_to_go(self) -> Session[Any] | None:
        return next((order[0] for order in self._first_to_go()), None)

    def _is_idle(self, session: Session[Any]) -> bool:
        return session.done == session.expected and time.monotonic() - session.used > self.limits.evict_after

    def _kept_tokens(self) -> int:
        """Tokens of KV memory that would be free without the sessions that are kept."""
        return self._freed(each for each in self._sessions.values() if each.is_kept)

    @property
    def kept_sessions(self) -> int:
        """How many sessions are kept for copies alone."""
        return sum(session.is_kept for session in self._sessions.values())

    def keep(self, id_: SessionId) -> None:
        """Holds a session for copies alone, if there is one with this id. Those above the limit are closed."""
        if (session := self._sessions.get(id_)) is None or session.is_kept:
            return
        session.is_kept = True
        self._forget(session, session.expected)
        most = self.limits.kept_tokens
        while most is not None and self._kept_tokens() > most and (first := self._next_to_go()) is not None:
            self.close(first.id)

    def touch(self, id_: SessionId) -> None:
        """Notes that a session is copied, if there is one with this id."""
        if (session := self._sessions.get(id_)) is not None:
            session.used = time.monotonic()

    def close_kept(self) -> None:
        """Closes the sessions that are kept for copies alone."""
        self.close_where(lambda id_: self._sessions[id_].is_kept)

    def evict(self, session: Session[Any]) -> None:
        """Forgets a session, which the caller frees. Its device is told that it is lost when it sends a request."""
        del self._sessions[session.id]
        self._open.add(session.member, -1)
        if session.kept:
            self._kept.add(session.member, -session.kept)

    def close(self, id_: SessionId) -> None:
        """Closes a session, if there is one with this id."""
        session = self._sessions.get(id_)
        if session is not None:
            self.evict(session)
            self.closed.append(session)

    def close_where(self, condition: Callable[[SessionId], bool]) -> None:
        """Closes all sessions whose id meets a condition."""
        for id_ in [id_ for id_ in self._sessions if condition(id_)]:
            self.close(id_)

    def free_idle(self) -> None:
        """Closes sessions that have been idle for `idle_timeout` seconds."""
        now = time.monotonic()
        self.close_where(lambda id_: now - self._sessions[id_].used > self.limits.idle_timeout)


def sequences_of(sessions: Iterable[Session[Any]]) -> list[KVSequence]:
    """What sessions hold in KV memory."""
    return [sequence for session in sessions for sequence in list(session.state.sequences)]


def _by_member(sessions: Iterable[Session[Any]]) -> dict[str, list[Session[Any]]]:
    by_member: dict[str, list[Session[Any]]] = {}
    for session in sessions:
        by_member.setdefault(session.member, []).append(session)
    return by_member

"""A session that outlives its workers: if one is lost, another one replays the history and takes over."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
import weakref
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from split_common.errors import (
    BrokerUnreachable,
    Busy,
    NonFinite,
    NoWorker,
    SessionLost,
    SplitError,
    StepFailed,
    UnknownAdapter,
    WorkerGone,
    WorkerSlow,
)
from split_common.protocol.headers import session_label
from split_common.transport.placement import NOBODY_ELSE
from split_device.sessions.client import Client
from split_device.sessions.dead_letters import DeadLetter, record
from split_device.sessions.notices import OnNotice, WorkerWait
from split_device.sessions.requests import Reply
from split_device.sessions.session import ABANDONED, CHECK_INTERVAL, RemoteSession
from split_device.sessions.tries import Blame, Tries

log = logging.getLogger(__name__)

#: Seconds to wait before a lost session is opened again.
RETRY_AFTER = 0.1

#: A step that is ready to be sent.
S = TypeVar("S")
S_contra = TypeVar("S_contra", contravariant=True)


class Replayable(Protocol[S_contra]):
    """How steps are sent, and how earlier steps are replayed on a new worker. A resilient session calls it."""

    @property
    def is_new(self) -> bool:
        """Whether no step has run yet."""

    def replay(self, session: RemoteSession, step: S_contra) -> None:
        """Sends a new worker what it must know before this step.

        Args:
            session: has just been opened.

        Raises:
            SplitError: the worker or the queue failed, or the history was not kept.
        """

    def send(self, session: RemoteSession, step: S_contra) -> list[Reply]:
        """Sends the requests of a step and waits for their replies. Raises what `RemoteSession.call` raises."""

    def is_spoilt(self, step: S_contra) -> bool:
        """Whether a step that was refused may have changed what its worker holds."""

    def describe(self, step: S_contra) -> tuple[int, int, int]:
        """The numbers of rows and tokens in a step that is given up, and of columns cached before it."""


class ResilientSession:
    """A session that is opened when the first step is sent, and again whenever it is lost.

    Not thread-safe: one thread at a time calls it, but any thread may `abandon` it. When it is garbage-collected,
    the session on the worker is closed.

    Args:
        client: finds workers.
        request_id: the id of the request that it belongs to; None for a random one.
        index: which of the request's choices it computes, from 0.
        on_notice: takes what is said while the session waits, beside the client's notices.

    Raises:
        ConfigError: the request id is not one.
    """

    def __init__(
        self, client: Client, request_id: str | None = None, index: int = 0, on_notice: OnNotice | None = None
    ) -> None:
        self._client = client
        self._on_notice = on_notice
        self._say = client.notices.also(on_notice)
        #: The wait of the step under way.
        self._wait: WorkerWait | None = None
        self._session: RemoteSession | None = None
        #: What its user and its workers call it.
        self.identity = client.name_session(request_id, index)
        self._index = index
        self._epochs = itertools.count()
        #: Whether to wait for a slow worker.
        self._patient = False
        self._abandoned = self._left = False
        #: Whether its step waits because workers are full. Any thread may read it.
        self.waits_for_room = False
        #: Whether it was lost and opened again, so that it holds what several workers have computed.
        self.moved = False
        self._closer: weakref.finalize[..., Any] | None = None
        # The session that it begins as a copy of, until it is opened.
        self._origin: RemoteSession | None = None

    def call(self, work: Replayable[S], step: S) -> list[Reply]:
        """Sends a step until a worker has answered all its requests.

        If the session is lost, it is opened on another worker and replayed there. While workers are full or none is
        left, this waits for the client's patience.

        Raises:
            StepFailed: so many workers failed or died at this step that it is given up; a dead letter records it.
            SessionLost: the session was abandoned, or lost and not taken over in time.
            Busy: workers were full all the time, also if the session was lost before.
            NoWorker: no worker could be found in time.
            UnknownAdapter: no worker that could be found has loaded the session's adapter.
            SplitError: a worker refused the step, or the queue failed; the next step opens the session again.
        """
        # A step leaves a slow worker only once, or it might begin again for ever.
        self._patient = False
        self._wait = WorkerWait(self._say, self._client.patience, self._client.command)
        tries = Tries(self._wait)
        while True:
            self._check()
            sent = self._session is not None
            try:
                session = self._session or self._open(work, step, tries.left, [*tries.lacking])
                self.moved = self.moved or tries.lost is not None
                session.patient, sent = self._patient, True
                tries.wait.over(session.channel.worker_name)
                replies = work.send(session, step)
                self.waits_for_room = False
                return replies
            except (Busy, SessionLost, NoWorker) as error:
                if not self._missed_copy(error):
                    self._pause(self._recover(error, work, step, tries, sent))
            except UnknownAdapter as error:
                # Another worker may have loaded it.
                worker = self._session.worker if self._session is not None else b""
                self.close()
                if worker in tries.lacking:
                    raise
                tries.lacking[worker] = error
            except SplitError as error:
                if not self._missed_copy(error):
                    # Some of several requests may have run, so it is unknown what the worker holds.
                    self.close()
                    raise

    def _recover(
        self, error: Busy | SessionLost | NoWorker, work: Replayable[S], step: S, tries: Tries, sent: bool
    ) -> float:
        """Leaves the worker if its session has ended. Returns after how many seconds the step is tried again.

        Args:
            error: ended this try.
            sent: whether the step itself was sent, and not only the replay.

        Raises:
            StepFailed, SessionLost, Busy, NoWorker, UnknownAdapter: it is not tried again, see `call`.
        """
        now = time.monotonic()
        if tries.lacking and not tries.left and self._session is None and str(error).startswith(NOBODY_ELSE):
            raise next(iter(tries.lacking.values())) from None
        self.waits_for_room = full = isinstance(error, Busy)
        slow, died = isinstance(error, WorkerSlow), False
        if isinstance(error, SessionLost):
            tries.lost = error
            log.info("%s: %s", self._described, error)
        if self._session is not None:
            died = tries.blame.note(error, self._session, sent)
            if self._session.ended or work.is_spoilt(step):
                tries.left = [self._session.worker]
                self.close()
        elif full:
            # The worker that was left may be the only one.
            tries.left = []
        if tries.blame.is_enough:
            raise self._give_up(error, tries.blame, work.describe(step)) from None
        if self._left:
            raise error
        self._patient = self._patient or slow
        if tries.waiting_since is None or slow or died:
            # The worker may have computed for a long time: patience starts again.
            tries.waiting_since = now
        pause = error.retry_after if isinstance(error, Busy) else RETRY_AFTER
        first = tries.lost is None and work.is_new and not self._client.served
        hopeless = first and isinstance(error, NoWorker) and not self._client.waits_after(error)
        if hopeless or now + pause > tries.waiting_since + self._client.patience:
            raise tries.wait.ended(error if full else tries.lost or error) from None
        tries.wait.failed(error, now, first)
        return pause

    def fork(self) -> ResilientSession:
        """A copy, on the same worker if possible; else its next step opens and replays it.

        Raises:
            SplitError: the queue failed, or the worker refused although it is not full.
        """
        copy = ResilientSession(self._client, self.identity.request_id, self._index, self._on_notice)
        if self._session is not None:
            with contextlib.suppress(SessionLost, Busy):
                copy._use(self._session.fork(copy.identity, next(copy._epochs)))
        return copy

    def begin_as_copy(self, origin: RemoteSession) -> None:
        """Makes the first step begin with what another session holds, at no further trip.

        If the worker does not hold it any more, the step opens the session anew, and replays it.
        """
        self._origin = origin

    @property
    def copied(self) -> bool:
        """Whether its worker has it as a copy of another session."""
        return self._session is not None and self._session.copied

    @property
    def remote(self) -> RemoteSession | None:
        """The session on its worker; None if there is none. Others may copy it, and must not step it."""
        return self._session

    def detach(self) -> RemoteSession | None:
        """Gives up the session on its worker, which keeps it for copies; None if it does not.

        The caller closes what it gets.
        """
        if self._session is None or self._abandoned or not self._session.keep():
            return None
        session, self._session = self._session, None
        if self._closer is not None:
            self._closer.detach()
        return session

    def close(self) -> None:
        """Frees the session on its worker, without waiting. The next step opens it again."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def abandon(self) -> None:
        """Makes the step under way in another thread, and all later ones, fail soon. Any thread may call it."""
        self._abandoned = True
        if (session := self._session) is not None:
            session.interrupt()

    def leave(self) -> None:
        """Lets the step under way in another thread end, unless its worker fails or is full.

        Any thread may call it.
        """
        self._left = True

    def nudge(self) -> None:
        """Makes a call under way look for requests that have come. Any thread may call it."""
        if (session := self._session) is not None:
            session.events.put(None)

    def _open(self, work: Replayable[S], step: S, avoid: Sequence[bytes], never: Sequence[bytes]) -> RemoteSession:
        """Opens the session: as a copy, or on some worker, where it is replayed."""
        origin, self._origin = self._origin, None
        if origin is not None and (copy := origin.copy(self.identity, next(self._epochs))) is not None:
            self._use(copy)
            log.info("%s: on worker %s, as a copy", self._described, copy.channel.worker_name)
            return copy
        session = self._client.open_session(avoid, self.identity, next(self._epochs), self._check, never)
        self._use(session)
        log.info("%s: on worker %s", self._described, session.channel.worker_name)
        try:
            work.replay(session, step)
        except BaseException:
            # The worker may hold a part of the history.
            session.close()
            raise
        self._client.counters["replays"] += not work.is_new
        return session

    def _missed_copy(self, error: SplitError) -> bool:
        """Whether the session was to be a copy, which its worker could not make. It is then opened anew.

        Nobody is told: what it was to be a copy of was held for as long as there was room.
        """
        session = self._session
        if session is None or not session.is_copying:
            return False
        if isinstance(error, WorkerGone | WorkerSlow | BrokerUnreachable | NonFinite):
            return False
        log.debug("%s: its beginning is not on worker %s: %s", self._described, session.channel.worker_name, error)
        self._client.counters["missed_copies"] += 1
        self.close()
        return True

    def _use(self, session: RemoteSession) -> None:
        if self._closer is not None:
            self._closer.detach()
        self._session = session
        if self._abandoned:
            session.interrupt()
        session.patient, session.say = self._patient, self._say
        self._closer = weakref.finalize(self, session.close)

    @property
    def _described(self) -> str:
        """Its names for the log: the user's, and the one that its worker logs."""
        label = self.identity.label if self._session is None else session_label(self._session.ref)
        return f"request {self.identity.request_id}, session {label}"

    def _check(self) -> None:
        """Raises SessionLost once the session was abandoned. Says that a step waits, if it has waited for long."""
        if self._wait is not None:
            self._wait.look(time.monotonic())
        if self._abandoned or (self._left and self._session is None):
            raise SessionLost(ABANDONED)

    def _pause(self, seconds: float) -> None:
        """Sleeps, but ends soon when the session is abandoned."""
        until = time.monotonic() + seconds
        while not (self._abandoned or self._left) and (remaining := until - time.monotonic()) > 0:
            time.sleep(min(remaining, CHECK_INTERVAL))
            if self._wait is not None:
                self._wait.look(time.monotonic())

    def _give_up(self, error: SplitError, blame: Blame, size: tuple[int, int, int]) -> StepFailed:
        """Records a step that must not reach another worker. Returns its error."""
        if not isinstance(error, StepFailed):
            error = StepFailed(
                f"{len(blame.workers)} workers died while they held this step, which is not tried again"
            )
        service = self._client.service
        rows, tokens, cached = size
        record(
            DeadLetter(
                model=self._client.model,
                layers=f"{service.first}:{service.last}",
                workers=blame.workers,
                rows=rows,
                tokens=tokens,
                cached=cached,
                reason=str(error),
                request_id=self.identity.request_id,
                session=self.identity.label,
                unit=msgspec.UNSET if self._client.unit == "layers" else self._client.unit,
            )
        )
        return error

"""A session that outlives its workers: when one is lost, another takes over what it held."""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from split_common.errors import (
    Busy,
    NoWorker,
    SessionLost,
    SplitError,
    StepFailed,
    WorkerGone,
    WorkerSlow,
)
from split_device.sessions.client import Client
from split_device.sessions.dead_letters import DeadLetter, record
from split_device.sessions.session import ABANDONED, CHECK_INTERVAL, RemoteSession, Reply

#: Seconds to wait before a lost session is opened again.
RETRY_AFTER = 0.1

#: A step is given up after this many failures of workers at it, or when their deaths count this much. (Workers may
#: also die for reasons of their own.)
MAX_FAILURES = 2
MAX_DEATHS = 4

#: What one death counts, at least. The steps that the worker held share the blame, since any of them may be the
#: cause; and workers that die for reasons of their own die one after another. A death before the step was sent,
#: during the replay, counts least: what is replayed has run elsewhere.
LEAST_DEATH = 0.25

#: A step that is ready to be sent.
S = TypeVar("S")
S_contra = TypeVar("S_contra", contravariant=True)


class Replayable(Protocol[S_contra]):
    """What a resilient session does not know: how steps are sent, and what a new worker must be told before."""

    @property
    def is_new(self) -> bool:
        """Whether no step has run yet."""

    def replay(self, remote: RemoteSession, step: S_contra) -> None:
        """Tells a worker, over a session that has just been opened, what it must know before this step.

        Raises:
            SplitError: the worker or the queue failed, or what is to be told was not kept.
        """

    def send(self, remote: RemoteSession, step: S_contra) -> list[Reply]:
        """Sends the requests of a step and waits for their replies. Raises what `RemoteSession.call` raises."""

    def is_spoilt(self, step: S_contra) -> bool:
        """Whether a step that was refused may have changed what its worker holds."""

    def describe(self, step: S_contra) -> tuple[int, int, int]:
        """Rows and tokens of a step that is given up, and the columns cached before it."""


@dataclass
class Blame:
    """Workers that failed or died at one step, and how much that counts against the step."""

    #: Names of workers that answered that they failed.
    failed: list[str] = field(default_factory=list)
    #: Names of workers that died, by their ids.
    died: dict[bytes, str] = field(default_factory=dict)
    #: What the deaths count, see `LEAST_DEATH`.
    deaths: float = 0.0

    def note(self, error: SplitError, remote: RemoteSession, sent: bool) -> bool:
        """Counts what became of a session's worker; returns whether another worker has died.

        Args:
            error: what ended the try.
            remote: the session.
            sent: whether the step had been sent to the worker, and not only what came before it.
        """
        if isinstance(error, StepFailed):
            self.failed.append(remote.channel.worker_name)
        if not isinstance(error, WorkerGone) or remote.worker in self.died:
            return False
        self.died[remote.worker] = remote.channel.worker_name
        self.deaths += max(LEAST_DEATH, 1 / error.held if sent else 0.0)
        return True

    @property
    def is_enough(self) -> bool:
        """Whether the step must not be tried again."""
        return len(self.failed) >= MAX_FAILURES or self.deaths >= MAX_DEATHS

    @property
    def workers(self) -> list[str]:
        """Names of the workers, one for each failure and death."""
        return [*self.failed, *self.died.values()]


class ResilientSession:
    """A session that is opened when the first step is sent, and again whenever it is lost.

    Not thread-safe: one thread at a time calls it, but any thread may `abandon` it. Its session on the worker is
    closed when it is garbage-collected.

    Args:
        client: finds workers.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._remote: RemoteSession | None = None
        self._number = client.new_number()
        self._epochs = itertools.count()
        #: Whether a slow worker is waited for.
        self._patient = False
        self._abandoned = False
        self._closer: weakref.finalize[..., Any] | None = None

    def call(self, work: Replayable[S], step: S) -> list[Reply]:
        """Sends a step until a worker has answered all its requests.

        A session that is lost is opened on another worker, which is told first what it has to know. While workers
        are full or none is left, this waits for the client's patience.

        Raises:
            StepFailed: workers failed or died at this step so often that it is given up; a dead letter says so.
            SessionLost: the session was abandoned, or lost and not taken over in time.
            Busy, NoWorker: no worker could be found in time.
            SplitError: a worker refused the step, or the queue failed; the session begins again with the next one.
        """
        blame = Blame()
        avoid: list[bytes] = []
        lost: SessionLost | None = None
        waiting_since: float | None = None
        # A slow worker is left once in a step, or the step might begin again for ever.
        self._patient = False
        while True:
            self._check()
            sent = self._remote is not None
            try:
                remote = self._remote or self._open(work, step, avoid)
                remote.patient, sent = self._patient, True
                return work.send(remote, step)
            except (Busy, SessionLost, NoWorker) as error:
                now = time.monotonic()
                lost = error if isinstance(error, SessionLost) else lost
                slow, died = isinstance(error, WorkerSlow), False
                if self._remote is not None:
                    died = blame.note(error, self._remote, sent)
                    if self._remote.ended or work.is_spoilt(step):
                        avoid = [self._remote.worker]
                        self.close()
                elif isinstance(error, Busy):
                    # The worker to avoid may be the only one.
                    avoid = []
                if blame.is_enough:
                    raise self._give_up(error, blame, work.describe(step)) from None
                self._patient = self._patient or slow
                if waiting_since is None or slow or died:
                    # The worker may have computed for long: patience starts again.
                    waiting_since = now
                pause = error.retry_after if isinstance(error, Busy) else RETRY_AFTER
                hopeless = isinstance(error, NoWorker) and lost is None and work.is_new and not self._client.served
                if hopeless or now + pause > waiting_since + self._client.patience:
                    raise lost or error from None
                self._pause(pause)
            except SplitError:
                # Some of several requests may have run: what the worker holds is unknown.
                self.close()
                raise

    def fork(self) -> ResilientSession:
        """A copy, on the same worker if possible; else it is opened and told all with its next step.

        Raises:
            SplitError: the queue failed, or the worker refused for another reason than that it is full.
        """
        twin = ResilientSession(self._client)
        if self._remote is not None:
            with contextlib.suppress(SessionLost, Busy):
                twin._hold(self._remote.fork(twin._number, next(twin._epochs)))
        return twin

    def close(self) -> None:
        """Frees the session on its worker; not waited for. The next step opens it again."""
        if self._remote is not None:
            self._remote.close()
            self._remote = None

    def abandon(self) -> None:
        """Makes the step under way in another thread, and all later ones, fail soon. Any thread may call it."""
        self._abandoned = True
        if (remote := self._remote) is not None:
            remote.interrupt()

    def _open(self, work: Replayable[S], step: S, avoid: Sequence[bytes]) -> RemoteSession:
        """Opens the session on some worker, and has it told what it must know."""
        remote = self._client.open_session(avoid, self._number, next(self._epochs), self._check)
        self._hold(remote)
        try:
            work.replay(remote, step)
        except BaseException:
            # It may hold a part of the history, whatever the reason.
            remote.close()
            raise
        self._client.counters["replays"] += not work.is_new
        return remote

    def _hold(self, remote: RemoteSession) -> None:
        if self._closer is not None:
            self._closer.detach()
        self._remote = remote
        if self._abandoned:
            remote.interrupt()
        remote.patient = self._patient
        self._closer = weakref.finalize(self, remote.close)

    def _check(self) -> None:
        """Raises SessionLost once the session was abandoned."""
        if self._abandoned:
            raise SessionLost(ABANDONED)

    def _pause(self, seconds: float) -> None:
        """Sleeps, but ends soon when the session is abandoned."""
        until = time.monotonic() + seconds
        while not self._abandoned and (remaining := until - time.monotonic()) > 0:
            time.sleep(min(remaining, CHECK_INTERVAL))

    def _give_up(self, error: SplitError, blame: Blame, size: tuple[int, int, int]) -> StepFailed:
        """The error of a step at which workers fail or die: it is recorded, and must not reach another worker."""
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
            )
        )
        return error

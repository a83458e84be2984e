"""A session that outlives its workers: whatever becomes of one, another takes over what it held."""

from __future__ import annotations

import itertools
import time
import weakref
from typing import Any, Generic, TypeVar

from split_common import payloads
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
from split_device.sessions.session import CHECK_INTERVAL, GIVEN_UP, RemoteSession

#: Seconds to wait before a lost session is opened again.
RETRY_AFTER = 0.1

#: A step at which workers failed so often, or that so many held when they died, is tried no more. (Workers may die
#: for reasons of their own.)
MAX_FAILURES = 2
MAX_DEATHS = 4

#: What a death counts by, at least. Steps that the worker held together share it: one of them may be to blame; and
#: where workers die for reasons of their own, they die one after another. It counts least before the step was
#: sent, while the worker was told what came before: that has run elsewhere.
LEAST_DEATH = 0.25

#: A request of the session, as `_send` takes it.
R = TypeVar("R")


class Lasting(Generic[R]):
    """A session that is opened when the first step is sent, and again whenever it is lost.

    Subclasses say how a worker is told what it has to know (`_open`), and how requests are sent (`_send`).
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self._remote: RemoteSession | None = None
        self._number = client.new_number()
        self._epochs = itertools.count()
        self._patient = False
        self._abandoned = False
        self._closer: weakref.finalize[..., Any] | None = None

    def _open(self, avoid: list[bytes]) -> None:
        """Opens a session on some worker and hands it to `_hold`."""
        raise NotImplementedError

    def _send(self, remote: RemoteSession, requests: list[R]) -> list[tuple[payloads.AnyReply, memoryview]]:
        """Sends the requests of a step and waits for their replies."""
        raise NotImplementedError

    def _letter(self, requests: list[R]) -> tuple[int, int, int]:
        """Rows and tokens of a step that is given up, and the columns cached before it."""
        raise NotImplementedError

    def _is_spoilt(self, requests: list[R]) -> bool:
        """Whether a step that was refused may have changed what its worker holds."""
        return False

    def _is_new(self) -> bool:
        """Whether no step has run yet."""
        raise NotImplementedError

    def _hold(self, remote: RemoteSession) -> None:
        if self._closer is not None:
            self._closer.detach()
        self._remote = remote
        if self._abandoned:
            remote.interrupt()
        remote.patient = self._patient
        self._closer = weakref.finalize(self, remote.close)

    def _close(self) -> None:
        if self._remote is not None:
            self._remote.close()
            self._remote = None

    def abandon(self) -> None:
        """Makes the step under way in another thread fail soon; nobody wants the session any more."""
        self._abandoned = True
        if (remote := self._remote) is not None:
            remote.interrupt()

    def _check(self) -> None:
        """Raises SessionLost when nobody wants the session any more."""
        if self._abandoned:
            raise SessionLost(GIVEN_UP)

    def _pause(self, seconds: float) -> None:
        """Waits, but no longer than the session is wanted."""
        until = time.monotonic() + seconds
        while not self._abandoned and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, CHECK_INTERVAL))

    def _persist(self, requests: list[R]) -> list[tuple[payloads.AnyReply, memoryview]]:
        """Sends requests until a worker answers them, whatever becomes of the first ones.

        A session that is lost is opened on another worker, which is told first what it has to know.
        """
        avoid: list[bytes] = []
        lost: SessionLost | None = None
        failed: list[str] = []
        died: dict[bytes, str] = {}
        deaths, told = 0.0, False
        waiting_since: float | None = None
        # A step that is left by one slow worker is left to the next one, or it would have to begin anew for ever.
        self._patient = False
        while True:
            self._check()
            try:
                if self._remote is None:
                    told = False
                    self._open(avoid)
                else:
                    self._remote.patient = self._patient
                assert self._remote is not None
                told = True
                return self._send(self._remote, requests)
            except (Busy, SessionLost, NoWorker) as error:
                now = time.monotonic()
                waiting_since = now if waiting_since is None else waiting_since
                lost = error if isinstance(error, SessionLost) else lost
                if (remote := self._remote) is not None:
                    name = remote.channel.channel.peer.name
                    if isinstance(error, StepFailed):
                        failed.append(name)
                    if isinstance(error, WorkerSlow):
                        self._patient, waiting_since = True, now
                    if isinstance(error, WorkerGone) and remote.worker not in died:
                        # It may have been at work for long: patience begins anew.
                        died[remote.worker], waiting_since = name, now
                        deaths += max(LEAST_DEATH, 1 / error.held if told else 0.0)
                    if remote.ended or self._is_spoilt(requests):
                        remote.close()
                        avoid, self._remote = [remote.worker], None
                elif isinstance(error, Busy):
                    # One that is to be avoided may be the only one.
                    avoid = []
                if len(failed) >= MAX_FAILURES or deaths >= MAX_DEATHS:
                    raise self._give_up(error, requests, [*failed, *died.values()]) from None
                fresh = lost is None and self._is_new() and not self.client.served
                pause = getattr(error, "retry_after", RETRY_AFTER)
                if now + pause > waiting_since + self.client.patience or (isinstance(error, NoWorker) and fresh):
                    raise lost or error from None
                self._pause(pause)
            except SplitError:
                # Of several requests some may have run: what the worker holds is not known any more.
                self._close()
                raise

    def _give_up(self, error: SplitError, requests: list[R], workers: list[str]) -> StepFailed:
        """A step that makes workers fail or die must not travel on: it is recorded, and refused."""
        if not isinstance(error, StepFailed):
            error = StepFailed(f"{len(workers)} workers died while they held this step, which is not tried again")
        service = self.client.service
        rows, tokens, cached = self._letter(requests)
        record(
            DeadLetter(
                model=self.client.model,
                layers=f"{service.first}:{service.last}",
                workers=workers,
                rows=rows,
                tokens=tokens,
                cached=cached,
                reason=str(error),
            )
        )
        return error

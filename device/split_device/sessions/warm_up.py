"""A channel that is set up before a session needs it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Protocol

from split_common.errors import SplitError
from split_common.protocol import payloads
from split_device.sessions.channels import Check
from split_device.sessions.session import RemoteSession

log = logging.getLogger(__name__)

#: Seconds after a warm-up before another one begins.
PAUSE = 30.0


class WarmUpHost(Protocol):
    """What a warm-up needs of the connection. `Client` is one."""

    @property
    def has_channel(self) -> bool:
        """Whether a session could be opened without setting up a channel."""

    def open_session(self, *, check: Check) -> RemoteSession:
        """Opens a session on some worker. Raises SplitError."""


class WarmUp:
    """Sets up a channel whenever there is none, on a thread of its own: a first step then takes one trip.

    A worker that has answered nobody yet gets one device at a time (`placement.Trials`), and a channel alone would
    keep it from all others for a minute. So a small step follows: once that is answered, the worker is free for
    all. What fails is told to nobody: a session that needs a worker meets it itself.

    Args:
        host: the connection.
        request, data: a first step that any worker of the service can compute, and its tensor's bytes.
    """

    def __init__(self, host: WarmUpHost, request: payloads.Step, data: memoryview) -> None:
        self._host = host
        self._request = request
        self._data = data
        self._begun = float("-inf")
        self._thread: threading.Thread | None = None
        self._session: RemoteSession | None = None
        self._closed = False

    def look(self) -> None:
        """Begins if there is no channel, and none was begun lately. Called on the transport's thread."""
        now = time.monotonic()
        if self._closed or self._host.has_channel or now - self._begun < PAUSE:
            return
        if self._thread is None or not self._thread.is_alive():
            self._begun = now
            self._thread = threading.Thread(target=self._run, name="lambda-split-warm-up", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends the one under way."""
        self._closed = True
        if (session := self._session) is not None:
            session.interrupt()

    def _run(self) -> None:
        try:
            self._session = session = self._host.open_session(check=self._check)
            with contextlib.closing(session):
                session.say = lambda _: None
                self._check()
                session.call([(self._request, self._data)])
        except SplitError as error:
            log.debug("no channel was set up ahead: %s", error)

    def _check(self) -> None:
        if self._closed:
            raise SplitError("this device has left the queue")

"""Where the HTTP server listens, and the thread that runs it."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from split_common.errors import ConfigError, SplitError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

HOST = "127.0.0.1"

#: Number of connections that may wait until they are accepted.
BACKLOG = 128

#: How long open responses may take to end when the server stops, in seconds.
SHUTDOWN_GRACE = 2

#: Interval between two checks whether the server has started, in seconds.
START_INTERVAL = 0.01


@contextlib.contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket that listens on a port of the loopback; 0 takes a free one. Clients that come early wait.

    It listens at once, because another user may take a port that is bound and not listened to.

    Raises:
        ConfigError: the port cannot be used.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen(BACKLOG)
        except OSError as error:
            raise ConfigError(f"port {port} cannot be used: {error.strerror}") from None
        yield listener


class _TypeOnly(logging.Filter):
    """Replaces an exception by its type: its message and its traceback may hold a prompt."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[0] is not None:
            record.msg, record.args = f"{record.getMessage().strip()}: {record.exc_info[0].__name__}", ()
            record.exc_info = record.exc_text = None
        return True


_type_only = _TypeOnly()


@contextlib.contextmanager
def running_server(app: ASGIApp, listener: socket.socket, stop: threading.Event, **limits: Any) -> Iterator[None]:
    """Answers HTTP requests in a thread, until the `with` block ends. `stop` is set when the server ends.

    Args:
        limits: those of `bounded` in `connections.py`, if they are not the usual ones.

    Raises:
        SplitError: the server cannot listen, or has ended by itself.
    """
    import uvicorn

    from split_device.serving.connections import bounded

    failures: list[Exception] = []
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=bounded(**limits),
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_GRACE,
            lifespan="off",
        )
    )

    logging.getLogger("uvicorn.error").addFilter(_type_only)

    def run() -> None:
        try:
            server.run([listener])
        except Exception as error:
            failures.append(error)
        finally:
            stop.set()

    # A thread of its own, because the main thread waits for signals.
    thread = threading.Thread(target=run, name="http")
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(START_INTERVAL)
        if server.started:
            yield
        if not thread.is_alive():
            raise SplitError(f"the HTTP server has ended: {failures[0] if failures else 'for no known reason'}")
    finally:
        server.should_exit = True
        thread.join()

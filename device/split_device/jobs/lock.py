"""One process at a time: a locked file that says who holds it. A killed process holds nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from split_common.errors import ConfigError
from split_common.files import private_dir

#: Seconds to try for: somebody who only looks whether the lock is held holds it for a moment.
MOMENT = 0.5


class Held(Exception):
    """Another process holds the lock."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"process {pid} holds the lock")
        self.pid = pid


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """Holds the lock meanwhile. Raises Held, and ConfigError where the file cannot be made."""
    file = _open(path)
    try:
        deadline = time.monotonic() + MOMENT
        while not _lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise Held(_pid(file))
            time.sleep(0.02)
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(file)


def holder(path: Path) -> int | None:
    """Process id of the one that holds the lock, if anybody does."""
    if not path.exists():
        return None
    file = _open(path)
    try:
        return None if _lock(file, fcntl.LOCK_SH) else _pid(file)
    finally:
        os.close(file)


def _open(path: Path) -> int:
    try:
        private_dir(path.parent)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{path} cannot be opened: {error.strerror}") from None


def _lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pid(file: int) -> int:
    """0 for a moment, while the holder writes it."""
    return int(os.pread(file, 20, 0) or b"0")

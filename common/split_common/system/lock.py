"""One process at a time: a locked file with the process id of its holder. The system unlocks it when that one ends.

Not by filelock: its locks are exclusive, so that two processes that only ask for the holder at the same time would
take each other for it, and `agent stop` would signal the process id of an earlier holder. Here they share the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from split_common.errors import ConfigError
from split_common.system.files import private_dir

#: Seconds to try for: a process that asks for the holder has a share in the lock for a moment.
MOMENT = 0.5


class Held(Exception):
    """Another process holds the lock."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"process {pid} holds the lock")
        self.pid = pid


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """Holds the lock meanwhile.

    Raises:
        Held: another process holds it.
        ConfigError: the file cannot be made.
    """
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
    """Process id of the holder of the lock, or None. Raises ConfigError if the file cannot be opened."""
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
    """The holder's process id; 0 for a moment, until the holder has written it."""
    return int(os.pread(file, 20, 0) or b"0")

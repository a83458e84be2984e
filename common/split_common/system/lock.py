"""A lock between processes: a file with its holder's process id. The system unlocks it when the holder ends.

Processes that only ask for the holder share the lock. With the exclusive locks of filelock, two of them would take
each other for the holder, and `agent stop` would signal the process id that an earlier holder left in the file.
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

#: Seconds to try for the lock: a process that asks for the holder shares it briefly.
ACQUIRE_TIMEOUT = 0.5

#: Seconds between two attempts.
ACQUIRE_INTERVAL = 0.02


class Held(Exception):
    """Another process holds the lock."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"process {pid} holds the lock")
        self.pid = pid


@contextlib.contextmanager
def holding(path: Path, *, remove: bool = False) -> Iterator[None]:
    """Holds the lock within a block.

    Args:
        remove: whether the file is removed afterwards. All that hold this lock say so, or none.

    Raises:
        Held: another process holds it.
        ConfigError: the file cannot be opened.
    """
    file = _acquired(path)
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        if remove:
            path.unlink(missing_ok=True)
        os.close(file)


def _acquired(path: Path) -> int:
    """The open file, locked. Raises Held."""
    deadline = time.monotonic() + ACQUIRE_TIMEOUT
    while True:
        file = _open(path)
        try:
            # An earlier holder may have removed the file between opening and locking it.
            if _lock(file, fcntl.LOCK_EX) and _is_at(file, path):
                return file
            if time.monotonic() > deadline:
                raise Held(_pid(file))
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        time.sleep(ACQUIRE_INTERVAL)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def holder(path: Path) -> int | None:
    """The holder's process id, or None.

    Raises:
        ConfigError: the file cannot be opened.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be opened: {error.strerror}") from None
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
    """The process id in the file; 0 if the holder has not written its own yet."""
    return int(os.pread(file, 20, 0) or b"0")

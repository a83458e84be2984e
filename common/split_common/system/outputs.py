"""Files that commands write for their users: checked before the work begins, and whole when it ends.

A link is followed. An existing file keeps its permissions, and its owner where that is possible. Pipes, devices and
standard streams are written to, and never replaced.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from split_common.errors import ConfigError
from split_common.system.console import stderr
from split_common.system.files import private_dir, state_dir, user_path
from split_common.system.signals import delay_signals

#: Paths of this process's open files. The number says which one.
_OWN_FILE = re.compile(r"/(?:dev|proc/self)/fd/(\d+)", re.ASCII)
_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}

#: Stands for stdout where a command takes a file to write.
STDOUT = "-"

#: Errors after which an existing file is written in place: its directory is not the user's to change, or it is a
#: mount of its own, as in containers.
_IN_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY}

#: Mode of a new file: what it holds is for the user alone.
NEW_FILE = 0o600


def output_path(path: Path) -> Path:
    """The path that a user means by the name of a file to write: `-` is stdout."""
    return Path("/dev/stdout") if str(path) == STDOUT else path


def is_stdout(path: Path) -> bool:
    """Whether a path names this process's stdout."""
    return _descriptor(path) == 1


def output_name(path: Path) -> str:
    """What messages call a file to write."""
    return "stdout" if is_stdout(path) else str(path)


def is_stream(path: Path) -> bool:
    """Whether a path is a pipe, a device or one of this process's open files, to which output is only appended."""
    if _descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def check_output(path: Path, *inputs: Path | None) -> None:
    """Checks that `write_output` can write to a path. Called before any work is done for it.

    Args:
        inputs: files that the work reads, which must not be overwritten; None stands for none.

    Raises:
        ConfigError: the path is a directory or one of the inputs, or it cannot be written.
    """
    path = user_path(path)
    try:
        _check(path, inputs)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def check_absent(path: Path) -> None:
    """Raises ConfigError for a file that exists: its user may want to keep it. Streams are written to."""
    if user_path(path).exists() and not is_stream(path):
        raise ConfigError(f"{path} exists already: remove it, or give --overwrite")


def _check(path: Path, inputs: tuple[Path | None, ...]) -> None:
    if is_stream(path):
        if _descriptor(path) is None and not os.access(path, os.W_OK):
            raise ConfigError(f"{path} cannot be written: permission denied")
        return
    for source in inputs:
        with contextlib.suppress(OSError):
            if source is not None and path.samefile(user_path(source)):
                raise ConfigError(f"{path} is the input: choose another output")
    target = _target(path)
    if target.is_dir():
        raise ConfigError(f"{path} is a directory")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not a directory")
    if target.exists() and not os.access(target, os.W_OK):
        raise ConfigError(f"{path} cannot be written: permission denied")
    if not target.exists() or _replaceable(target):
        try:
            tempfile.TemporaryFile(dir=target.parent).close()
        except OSError as error:
            if not (target.exists() and error.errno in _IN_PLACE):
                raise ConfigError(f"{target.parent} cannot be written: {error.strerror}") from None


def write_output(path: Path, data: bytes | IO[bytes]) -> None:
    """Writes a file. A regular file is replaced as a whole: after a crash it is the old one or the new one.

    Args:
        data: the content; of a file, the rest of it.

    Raises:
        ConfigError: it cannot be written.
    """
    path = user_path(path)
    content = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        if is_stream(path):
            number = _descriptor(path)
            with _opened(path) if number is None else os.fdopen(os.dup(number), "wb") as stream:
                shutil.copyfileobj(content, stream)
            return
        target = _target(path)
        if not (_replaceable(target) and _replace(target, content)):
            # A signal that comes now does not leave half of the old file behind half of the new one.
            with delay_signals(), target.open("r+b") as file:
                shutil.copyfileobj(content, file)
                file.truncate()
                _sync(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def _opened(path: Path) -> IO[bytes]:
    """Opens a pipe or a device. Says so if a pipe has no reader yet, for which this waits."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        stderr.print(f"{path}: waiting for somebody who reads it", soft_wrap=True)
        return path.open("wb")
    os.set_blocking(handle, True)
    return os.fdopen(handle, "wb")


def write_lines(path: Path, lines: Iterable[str], ready: Callable[[IO[bytes]], object] | None = None) -> None:
    """Writes a file of lines, which have their ends, as `write_output` does. They may be more than memory holds.

    Args:
        ready: gets the whole content before the file is touched.
    """
    with tempfile.TemporaryFile(dir=private_dir(state_dir())) as file:
        for line in lines:
            file.write(line.encode())
        if ready is not None:
            file.seek(0)
            ready(file)
        file.seek(0)
        write_output(path, file)


def _descriptor(path: Path) -> int | None:
    """The number of this process's open file that a path names."""
    text = str(path)
    match = _OWN_FILE.fullmatch(text)
    return int(match[1]) if match else _STREAMS.get(text)


def _target(path: Path) -> Path:
    """The file behind all links, which need not exist. Raises ConfigError for links in a circle."""
    try:
        target = path.resolve()
    except RuntimeError:  # Python 3.12 and older
        target = path
    if target.is_symlink():
        raise ConfigError(f"{path} is a link that leads to itself")
    return target


def _replaceable(target: Path) -> bool:
    """Whether a file may be replaced by a new one: not if it has other names, which would keep the old content."""
    return not target.exists() or target.stat().st_nlink == 1


def _replace(target: Path, content: IO[bytes]) -> bool:
    """Puts a new file in place of the old one. False if the directory does not allow it and there is an old one."""
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".tmp")
    except OSError as error:
        if target.exists() and error.errno in _IN_PLACE:
            return False
        raise
    temporary, start = Path(name), content.tell()
    try:
        with os.fdopen(handle, "wb") as file:
            _imitate(handle, target)
            shutil.copyfileobj(content, file)
            _sync(file)
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _IN_PLACE:
            content.seek(start)
            return False
        raise
    return True


def _imitate(handle: int, target: Path) -> None:
    """Gives an open file the mode and, where that is allowed, the owner of an existing one."""
    if not target.exists():
        os.fchmod(handle, NEW_FILE)
        return
    old = target.stat()
    with contextlib.suppress(OSError):
        os.fchown(handle, old.st_uid, old.st_gid)
    os.fchmod(handle, stat.S_IMODE(old.st_mode))


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())

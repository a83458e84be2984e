"""Where lambda-split keeps its files, and how it reads and writes those that are secret or must stay whole."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
import warnings
from pathlib import Path

import platformdirs

from split_common.errors import ConfigError, KeysError

_APP = "lambda-split"

#: Longest part of a path in an error message, in characters.
_SHOWN = 80


def user_path(path: str | Path) -> Path:
    """A path as the user wrote it, with `~` expanded. As in a shell, that of an unknown user stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises for an unknown user)


def is_there(path: Path) -> bool:
    """Whether something is at a path. Raises ConfigError if the system cannot say: the name is too long, say."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        name = str(path)
        shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…"
        raise ConfigError(f"{shown} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{str(path)[:_SHOWN]!r} is not a path: it holds a null byte") from None
    return True


def config_dir() -> Path:
    """The directory for the user's settings and keys: `LAMBDA_SPLIT_CONFIG`, or else the platform's."""
    return user_path(os.environ.get("LAMBDA_SPLIT_CONFIG") or platformdirs.user_config_path(_APP, appauthor=False))


def cache_dir() -> Path:
    """The directory for what can be made again: `LAMBDA_SPLIT_CACHE`, or else the platform's."""
    return user_path(os.environ.get("LAMBDA_SPLIT_CACHE") or platformdirs.user_cache_path(_APP, appauthor=False))


def state_dir() -> Path:
    """The directory for jobs, logs and dead letters: `LAMBDA_SPLIT_STATE`, or else the platform's."""
    return user_path(os.environ.get("LAMBDA_SPLIT_STATE") or platformdirs.user_state_path(_APP, appauthor=False))


def runtime_dir() -> Path:
    """The directory for what may vanish at logout: `LAMBDA_SPLIT_RUNTIME`, or else the platform's."""
    configured = os.environ.get("LAMBDA_SPLIT_RUNTIME")
    if configured:
        return user_path(configured)
    with warnings.catch_warnings(action="ignore"):  # It may fall back to /tmp: see `private_dir`.
        return platformdirs.user_runtime_path(_APP, appauthor=False)


def private_dir(path: Path) -> Path:
    """Creates a directory and its missing parents with mode 0700, and returns it.

    Raises:
        KeysError: the directory cannot be created, something else is in its place, another user may write to it, or
            it, its parent or the link in its place belongs to another user: the platform's runtime directory may
            lie under `/tmp`, where anyone can create it first.
    """
    whole = path.absolute()
    try:
        _make_dirs(whole)
        parent = os.open(whole.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            above = os.fstat(parent)
            place = os.lstat(whole.name or ".", dir_fd=parent)
            found = os.stat(whole.name or ".", dir_fd=parent)
        finally:
            os.close(parent)
    except OSError as error:
        raise KeysError(f"{path} cannot be created: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise KeysError(f"{path} is not a directory")
    me = os.geteuid()
    # The owner of a link decides where it leads. In a sticky directory, like /tmp, others cannot replace it.
    if found.st_uid != me or not {place.st_uid, above.st_uid} <= {me, 0}:
        raise KeysError(f"{path} or its parent belongs to another user")
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        raise KeysError(f"{whole.parent} can be written by other users; run: chmod o-w {whole.parent}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KeysError(f"{path} can be written by other users; run: chmod 700 {path}")
    return path


def private_cache(name: str) -> Path:
    """A directory in the cache that only this user can write; one for this process alone if there can be none."""
    try:
        return private_dir(cache_dir() / name)
    except KeysError:
        fresh = Path(tempfile.mkdtemp(prefix=f"{_APP}-{name}-"))
        atexit.register(shutil.rmtree, fresh, ignore_errors=True)
        return fresh


def check_writable(directory: Path) -> None:
    """Creates a directory if it is missing. Raises KeysError if no file can be made in it."""
    try:
        _make_dirs(directory)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise KeysError(f"{directory} cannot be written: {error.strerror}") from None


def write_private(path: Path, data: bytes) -> None:
    """Writes a file of mode 0600 atomically: a crash leaves the old file or the new one.

    Raises:
        KeysError: the file cannot be written.
    """
    _write(path, data, 0o600)


def write_public(path: Path, data: bytes) -> None:
    """As `write_private`, with mode 0644."""
    _write(path, data, 0o644)


def read_private(path: Path) -> bytes:
    """The bytes of a secret file.

    Raises:
        KeysError: it is missing, cannot be read, belongs to another user than root, or is open to its group or to
            others.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_uid not in (os.geteuid(), 0):
                raise KeysError(f"{path} belongs to another user; run: chown {os.geteuid()} {path}")
            if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise KeysError(f"{path} is open to other users; run: chmod 600 {path}")
            return file.read()
    except OSError as error:
        raise _unreadable(path, error) from None


def read_public(path: Path) -> bytes:
    """The bytes of a file that is not secret.

    Raises:
        KeysError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> KeysError:
    if isinstance(error, FileNotFoundError):
        return KeysError(f"{path} is missing; run `lambda-split keys init`, or copy it from the operator's machine")
    return KeysError(f"{path} cannot be read: {error.strerror}")


def _make_dirs(path: Path) -> None:
    """Creates a directory and its parents with mode 0700; `Path.mkdir` would give the parents the default mode."""
    for folder in reversed([path, *path.parents]):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)


def _write(path: Path, data: bytes, mode: int) -> None:
    try:
        _make_dirs(path.parent)
        _replace(path, data, mode)
        _sync_directory(path.parent)
    except OSError as error:
        raise KeysError(f"{path} cannot be written: {error.strerror}") from None


def _replace(path: Path, data: bytes, mode: int) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_directory(path: Path) -> None:
    """Makes renames in a directory survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

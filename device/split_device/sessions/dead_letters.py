"""Records of steps that were given up because workers failed or died at them. No states, text or keys."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

import msgspec

from split_common.errors import ConfigError
from split_common.system.files import private_dir, state_dir

log = logging.getLogger(__name__)

#: Bytes after which the file becomes `dead-letters.1.jsonl`, in place of an earlier one: thousands of letters.
MAX_FILE = 4 * 1024 * 1024

#: Most characters that are kept of a reason, which may come from a worker.
MAX_REASON = 500


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A step that was given up: `tokens` tokens in `rows` rows together, to append to `cached` columns."""

    model: str
    layers: str
    workers: list[str]
    rows: int
    tokens: int
    cached: int
    reason: str
    #: Seconds since 1970.
    time: float = msgspec.field(default_factory=time.time)
    #: The request that the step belonged to; empty if the letter is from an older version.
    request_id: str = ""
    #: The first 8 hexadecimal digits of the session's key, by which broker and worker name it.
    session: str = ""
    #: What `layers` counts, if not layers: "blocks" of a denoiser.
    unit: str | msgspec.UnsetType = msgspec.UNSET


def record(letter: DeadLetter) -> None:
    """Appends a letter to the file. If that fails, it logs a warning."""
    log.warning("request %s, session %s: a step was given up: %s", letter.request_id, letter.session, letter.reason)
    letter = msgspec.structs.replace(letter, reason=letter.reason[:MAX_REASON])
    try:
        private_dir(_path().parent)
        with contextlib.suppress(FileNotFoundError):
            if _path().stat().st_size > MAX_FILE:
                _path().replace(_old_path())
        file = os.open(_path(), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(file, msgspec.json.encode(letter) + b"\n")
        finally:
            os.close(file)
    except (OSError, ConfigError) as error:
        log.warning("it could not be recorded: %s", error)


def read() -> list[DeadLetter]:
    """All letters, the oldest first; lines that are not letters are skipped.

    Raises:
        ConfigError: a file of them cannot be read.
    """
    return [*_read(_old_path()), *_read(_path())]


def _read(path: Path) -> list[DeadLetter]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    letters = []
    for line in lines:
        try:
            letters.append(msgspec.json.decode(line, type=DeadLetter))
        except msgspec.DecodeError:
            log.warning("%s has a line that is not a dead letter", path)
    return letters


def clear() -> None:
    """Deletes all letters. Raises ConfigError if a file of them cannot be removed."""
    for path in (_old_path(), _path()):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"{path} cannot be removed: {error.strerror}") from None


def _path() -> Path:
    return state_dir() / "dead-letters.jsonl"


def _old_path() -> Path:
    return state_dir() / "dead-letters.1.jsonl"

"""Records of steps that were given up because workers failed or died at them. No states, text or keys."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import msgspec

from split_common.errors import ConfigError
from split_common.system.files import private_dir, state_dir

log = logging.getLogger(__name__)

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


def record(letter: DeadLetter) -> None:
    """Appends a letter to the file. If that fails, it logs a warning."""
    log.warning("a step was given up: %s", letter.reason)
    letter = msgspec.structs.replace(letter, reason=letter.reason[:MAX_REASON])
    try:
        private_dir(_path().parent)
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
        ConfigError: the file cannot be read.
    """
    try:
        lines = _path().read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{_path()} cannot be read: {error.strerror}") from None
    letters = []
    for line in lines:
        try:
            letters.append(msgspec.json.decode(line, type=DeadLetter))
        except msgspec.DecodeError:
            log.warning("%s has a line that is not a dead letter", _path())
    return letters


def clear() -> None:
    """Deletes all letters. Raises ConfigError if the file cannot be removed."""
    try:
        _path().unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{_path()} cannot be removed: {error.strerror}") from None


def _path() -> Path:
    return state_dir() / "dead-letters.jsonl"

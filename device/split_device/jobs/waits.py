"""What the agent's jobs wait for, for those who watch them from other processes: a line in a file."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from split_common.errors import KeysError
from split_common.system.files import state_dir, write_private

log = logging.getLogger(__name__)

#: Most bytes that are read of the line.
_MAX_LINE = 4096


def _path() -> Path:
    return state_dir() / "agent-waits"


def say(text: str) -> None:
    """Logs what is said of workers, and keeps it until `over`. Any thread may call it."""
    log.warning("%s", text)
    with contextlib.suppress(KeysError, OSError):
        write_private(_path(), text.encode())


def over() -> None:
    """Forgets what was said: jobs make progress, or the agent ends."""
    with contextlib.suppress(OSError):
        _path().unlink(missing_ok=True)


def said() -> str:
    """What was said last; empty if no job waits."""
    try:
        with _path().open("rb") as file:
            return file.read(_MAX_LINE).decode(errors="replace")
    except OSError:
        return ""

"""Where a batch lies on disk while it is not done: its record, its plan, its store and its lock."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from pathlib import Path
from typing import Literal

import msgspec

from split_common.system.files import state_dir, user_path, write_private
from split_common.system.outputs import is_stream
from split_device.batches.source import InputForm

#: How answers are written: lines of JSON, a table, or texts one a line.
OutputForm = Literal["jsonl", "csv", "text"]

#: Suffix of a plan that is being written.
NEW_PLAN = ".new"

#: Names of batches begin with this.
PREFIX = "batch-"


class Written(msgspec.Struct, frozen=True):
    """The file of answers as it was written: what changes if somebody else writes it."""

    size: int
    mtime_ns: int


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a batch is, without prompts or answers. Times are in seconds since the epoch."""

    version: Literal[1] = 1
    source: str
    output: str
    input_form: InputForm
    output_form: OutputForm
    #: Directory of the pictures.
    output_dir: str | None = None
    #: Number of lines, and of jobs that they became.
    lines: int
    jobs: int
    created: float
    #: When the answers were written, and how many of them are errors.
    finished: float | None = None
    errors: int = 0
    written: Written | None = None


class Place:
    """The files of one batch.

    Args:
        store: the path of its store.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self.plan = store.with_suffix(".plan")
        self.lock = store.with_suffix(".lock")
        self._record = store.with_suffix(".json")

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.store.stem}"

    def record(self) -> Record | None:
        """The record; None if there is none, or an earlier version wrote none."""
        try:
            return msgspec.json.decode(self._record.read_bytes(), type=Record)
        except (OSError, msgspec.MsgspecError):
            return None

    def write(self, record: Record) -> None:
        """Raises KeysError if the record cannot be written."""
        write_private(self._record, msgspec.json.encode(record))

    def remove(self) -> None:
        """Removes all but the lock, whose holder removes it."""
        wal, shm = (self.store.with_name(self.store.name + suffix) for suffix in ("-wal", "-shm"))
        for path in (self._record, self.plan, self.plan.with_suffix(NEW_PLAN), self.store, wal, shm):
            path.unlink(missing_ok=True)


def batches_dir() -> Path:
    return state_dir() / "batches"


def place_of(output: Path, source: Path | None = None) -> Place:
    """The place of the batch whose answers go to `output`; of a stream, also by its requests."""
    name = str(output.resolve())
    if source is not None and is_stream(output):
        name = f"{source.resolve()}\0{output}"
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return Place(batches_dir() / f"{digest}.db")


def stamp(output: Path) -> Written | None:
    """What identifies the present content of a file; None for a stream, or if there is no file."""
    with contextlib.suppress(OSError):
        found = user_path(output).stat()
        if stat.S_ISREG(found.st_mode):
            return Written(found.st_size, found.st_mtime_ns)
    return None


def now() -> float:
    return time.time()

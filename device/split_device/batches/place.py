"""Where a batch lies on disk while it is not done: its record, its plan, its store and its lock."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from pathlib import Path
from typing import IO, Literal

import msgspec

from split_common.errors import UnknownJob
from split_common.system.files import state_dir, user_path, write_private
from split_common.system.lock import holder
from split_common.system.outputs import is_stream
from split_device.batches.source import InputForm
from split_device.jobs.agent import running_agent

#: How answers are written: lines of JSON, a table, or texts, one per line.
OutputForm = Literal["jsonl", "csv", "txt"]

#: running: a process works on it. waiting: the agent will. interrupted: its command, run again, goes on.
#: ended: its answers are written.
BatchState = Literal["running", "waiting", "interrupted", "ended"]

#: Suffix of a plan that is being written.
NEW_PLAN = ".new"

#: Bytes of a file of answers that are hashed at a time.
DIGESTED = 1024 * 1024

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
    #: Whether the agent answers it.
    detached: bool = False
    #: When the answers were written, and how many of them are errors.
    finished: float | None = None
    errors: int = 0
    written: Written | None = None
    #: SHA-256 of the file of answers that is about to be written.
    writing: str | msgspec.UnsetType = msgspec.UNSET
    #: Why the agent cannot go on with it.
    problem: str | None = None


class FinishedBatch(msgspec.Struct, frozen=True):
    """What is kept of a batch without errors: how many lines and answers it had, of which kind, and the file."""

    lines: int
    jobs: int
    #: Identifies all lines with their settings, see `split_device.batches.done`.
    fingerprint: str
    written: Written


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
        self.done = store.with_suffix(".done")

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.store.stem}"

    def record(self) -> Record | None:
        """The record; None if there is none, or an earlier version wrote none."""
        try:
            return msgspec.convert(json.loads(self._record.read_bytes()), Record)
        except (OSError, ValueError, msgspec.MsgspecError):
            return None

    def write(self, record: Record) -> None:
        """Raises KeysError if the record cannot be written."""
        # Names of files need not be UTF-8.
        write_private(self._record, json.dumps(msgspec.to_builtins(record), separators=(",", ":")).encode())

    def state(self, record: Record) -> BatchState:
        if holder(self.lock) is not None:
            return "running"
        if record.finished is not None:
            return "ended"
        waits = record.detached and record.problem is None and running_agent() is not None
        return "waiting" if waits else "interrupted"

    def remove(self, record_too: bool = True) -> None:
        """Removes all but the lock, whose holder removes it; the record only if that is wanted."""
        wal, shm = (self.store.with_name(self.store.name + suffix) for suffix in ("-wal", "-shm"))
        if record_too:
            self._record.unlink(missing_ok=True)
        for path in (self.plan, self.plan.with_suffix(NEW_PLAN), self.store, wal, shm):
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


def places() -> list[tuple[Place, Record]]:
    """All batches that have a record, the oldest first."""
    found = [Place(path.with_suffix(".db")) for path in batches_dir().glob("*.json")]
    known = [(place, record) for place in found if (record := place.record()) is not None]
    return sorted(known, key=lambda each: each[1].created)


def is_batch(name: str) -> bool:
    """Whether this is the name of a batch, and not of a job."""
    return name.startswith(PREFIX)


def find_batch(name: str) -> tuple[Place, Record]:
    """The batch of this name. Raises UnknownJob if there is none."""
    stem = name.removeprefix(PREFIX)
    place = Place(batches_dir() / f"{stem}.db")
    record = place.record() if stem.isalnum() else None
    if record is None:
        raise UnknownJob(f"there is no {name}: a batch is forgotten when all its answers are written")
    return place, record


def stamp(output: Path) -> Written | None:
    """What identifies the present content of a file; None for a stream, or if there is no file."""
    with contextlib.suppress(OSError):
        found = user_path(output).stat()
        if stat.S_ISREG(found.st_mode) and not is_stream(output):
            return Written(found.st_size, found.st_mtime_ns)
    return None


def has_written(record: Record, output: Path) -> bool:
    """Whether a file of answers is as its batch left it, even if the batch was killed before it could note that."""
    found = stamp(output)
    if found is None or record.written == found:
        return found is not None
    if record.writing is msgspec.UNSET:
        return False
    with contextlib.suppress(OSError), user_path(output).open("rb") as file:
        return digest_of(file) == record.writing
    return False


def digest_of(file: IO[bytes]) -> str:
    """SHA-256 of the rest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    while data := file.read(DIGESTED):
        digest.update(data)
    return digest.hexdigest()


def now() -> float:
    return time.time()

"""The plan of a batch: a file with what is kept of each line until it is answered, sealed as its store is."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from split_common.errors import JobsError
from split_device.batches.lines import Entry
from split_device.batches.place import NEW_PLAN
from split_device.jobs.store import Store


class Plan:
    """A plan on disk, which may be larger than memory."""

    def __init__(self, path: Path, store: Store) -> None:
        self._path = path
        self._store = store

    def entries(self) -> Iterator[Entry]:
        """The entries, in the order of the lines. Raises JobsError if the file is missing or damaged."""
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file):
                    data = self._store.unseal(base64.b64decode(line), f"plan/{number}")
                    yield msgspec.msgpack.decode(data, type=Entry)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise JobsError(f"{self._path} cannot be read ({error}): run the batch again") from None


class PlanWriter:
    """Writes a new plan, which `commit` puts in place of the old one. A context manager."""

    def __init__(self, path: Path, store: Store) -> None:
        self._path = path
        self._store = store
        self._new = path.with_suffix(NEW_PLAN)
        self._file = _open_new(self._new)
        self._count = 0

    def add(self, entry: Entry) -> None:
        data = self._store.seal(msgspec.msgpack.encode(entry), f"plan/{self._count}")
        self._file.write(base64.b64encode(data) + b"\n")
        self._count += 1

    def commit(self) -> Plan:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._new.replace(self._path)
        return Plan(self._path, self._store)

    def __enter__(self) -> PlanWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _open_new(path: Path) -> BinaryIO:
    """Opens an empty file for the user alone; one that a killed process left is used again."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb")

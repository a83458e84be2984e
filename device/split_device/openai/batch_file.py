"""A file of requests in OpenAI's batch format, and the file of their answers.

The requests become jobs in a store of their own. If the process is killed, a rerun continues with what is stored.
When all have ended, their answers are written at once, in the order of the requests. Requests and answers may be
larger than memory: they are on disk, and one line at a time is here.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from split_common.errors import JobsError
from split_common.system.files import state_dir
from split_common.system.outputs import is_stream, write_output
from split_common.system.text import json_line
from split_device.jobs.job import FINAL, Job
from split_device.jobs.store import Store
from split_device.openai.batch_requests import Line, Requests
from split_device.openai.responses import Choice, completion

#: Lines become jobs in transactions of about this size, in bytes, and of this number of lines at most.
SLICE_BYTES = 4 * 1024**2
SLICE_LINES = 256


class BatchJobs:
    """The requests of a file as jobs of a store. A context manager, which closes an unnamed file of their ids."""

    def __init__(self, requests: Requests, store: Store) -> None:
        self._requests = requests
        self._store = store
        #: For each line its digest and the ids of its jobs.
        self._plan = tempfile.TemporaryFile("w+", dir=store.path.parent, encoding="ascii")  # noqa: SIM115
        self.jobs = 0
        for lines in _slices(requests):
            self._add(lines)
        # Removes jobs of an earlier run with another file.
        store.keep(id_ for _, ids in self._planned() for id_ in ids)
        # The cause of the failure may be gone.
        store.retry_failed()

    def __enter__(self) -> BatchJobs:
        return self

    def __exit__(self, *_: object) -> None:
        self._plan.close()

    def _add(self, lines: list[Line]) -> None:
        wanted = [
            (task, 0, key)
            for line in lines
            if line.query
            for task, key in zip(line.query.tasks, line.keys(), strict=True)
        ]
        ids = iter(self._store.submit_ids(wanted))
        for line in lines:
            self._plan.write(" ".join([line.digest, *itertools.islice(ids, len(line.keys()))]) + "\n")
        self.jobs += len(wanted)

    def _planned(self) -> Iterator[tuple[str, list[str]]]:
        self._plan.seek(0)
        for entry in self._plan:
            digest, *ids = entry.split()
            yield digest, ids

    @property
    def ended(self) -> int:
        counts = self._store.count()
        return sum(counts[state] for state in FINAL)

    def records(self) -> Iterator[dict[str, Any]]:
        """The answers, in the order of the requests. Raises JobsError if the file has other requests by now."""
        for line, planned in itertools.zip_longest(self._requests, self._planned()):
            if line is None or planned is None or line.digest != planned[0]:
                raise JobsError(f"{self._requests.path} was changed meanwhile: run the same command again")
            yield self._record(line, [self._store.get(id_) for id_ in planned[1]])

    def _record(self, line: Line, jobs: list[Job]) -> dict[str, Any]:
        record = {"id": f"batch_req_{line.digest[:24]}", "custom_id": line.custom_id}
        error = line.error or next((_error(job) for job in jobs if job.state != "succeeded"), None)
        if error is not None or line.query is None:
            return record | {"response": None, "error": error}
        choices = [
            Choice(self._store.progress(job.id).text, job.tokens, job.finish_reason or "length") for job in jobs
        ]
        body = completion(
            line.query.kind,
            line.digest[:24],
            int(jobs[0].created),
            line.query.model,
            jobs[0].prompt_tokens or 0,
            choices,
        )
        response = {"status_code": 200, "request_id": f"req_{line.digest[:24]}", "body": body}
        return record | {"response": response, "error": None}


def _error(job: Job) -> dict[str, str]:
    name, _, message = (job.error or f"the job was {job.state}").partition(": ")
    return {"code": name, "message": message} if message else {"code": job.state, "message": name}


def write(path: Path, records: Iterator[dict[str, Any]]) -> tuple[int, int]:
    """Writes all records at once; returns their number, and how many of them are errors."""
    count = errors = 0
    with tempfile.TemporaryFile(dir=state_dir()) as lines:
        for record in records:
            count += 1
            errors += record["error"] is not None
            lines.write(f"{json_line(record)}\n".encode())
        lines.seek(0)
        write_output(path, lines)
    return count, errors


def _slices(lines: Iterable[Line]) -> Iterator[list[Line]]:
    some: list[Line] = []
    for line in lines:
        some.append(line)
        if len(some) == SLICE_LINES or sum(each.size for each in some) >= SLICE_BYTES:
            yield some
            some = []
    yield some


def work_path(output: Path, source: Path | None = None) -> Path:
    """The path of the store for the batch whose answers go to `output`; of a stream, also by its requests."""
    place = str(output.resolve())
    if source is not None and is_stream(output):
        place = f"{source.resolve()}\0{output}"
    name = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
    return state_dir() / "batches" / f"{name}.db"


def remove(path: Path) -> None:
    """Removes a store's files."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)

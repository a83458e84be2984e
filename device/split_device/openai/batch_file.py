"""A file of requests in OpenAI's batch format, and the file of their answers.

The requests become jobs in a store of their own. If the process is killed, a rerun continues with what is stored.
When all have ended, their answers are written at once, in the order of the requests.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from split_common.errors import ConfigError, SplitError
from split_common.system.files import state_dir, write_private
from split_device.jobs.job import FINAL, Job, ModelChoice, Task
from split_device.jobs.store import Store
from split_device.openai.requests import COMPLETION_PATHS, ApiError, Query, parse
from split_device.openai.responses import Choice, completion


class BadLine(SplitError):
    """A line that is not a valid request."""


@dataclass(frozen=True)
class Line:
    """A line of the file: a request, or the error in it."""

    number: int
    custom_id: str | None
    query: Query | None
    error: dict[str, Any] | None
    #: Identifies the request across runs, wherever it is in the file.
    digest: str

    def keys(self) -> list[str]:
        """Keys of the request's jobs, one for each choice."""
        return [f"{self.digest}/{choice}" for choice in range(len(self.query.tasks) if self.query else 0)]


def read(path: Path, model: ModelChoice) -> list[Line]:
    """The lines of a file, except empty ones. Raises ConfigError if it cannot be read."""
    try:
        raw = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    seen: set[str] = set()
    return [_line(number, text, model, seen) for number, text in enumerate(raw, 1) if text.strip()]


def _line(number: int, text: bytes, model: ModelChoice, seen: set[str]) -> Line:
    custom_id: str | None = None
    query: Query | None = None
    failure: dict[str, Any] | None = None
    try:
        fields = _fields(text)
        given = fields.get("custom_id")
        if not isinstance(given, str) or not given:
            raise BadLine("custom_id is missing, or is not a string")
        custom_id = given
        if custom_id in seen:
            raise BadLine(f"an earlier line has the custom_id {custom_id!r}")
        seen.add(custom_id)
        if fields.get("method", "POST") != "POST":
            raise BadLine("method is not POST")
        kind = COMPLETION_PATHS.get(str(fields.get("url")))
        if kind is None:
            raise BadLine(f"url is not one of {', '.join(COMPLETION_PATHS)}")
        query = parse(kind, fields.get("body"), model)
        if query.stream:
            raise BadLine("a line of a batch cannot be streamed")
        if query.logprobs is not None:
            raise BadLine("logprobs are not supported in a batch")
    except ApiError as error:
        query, failure = None, {"code": error.code or error.type, "message": str(error)}
    except BadLine as error:
        query, failure = None, {"code": "invalid_request", "message": str(error)}
    settings = msgspec.json.encode((custom_id, model, query.tasks if query else ()))
    return Line(number, custom_id, query, failure, hashlib.sha256(settings).hexdigest())


def _fields(text: bytes) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadLine("the line is not JSON") from None
    if not isinstance(fields, dict):
        raise BadLine("the line is not a JSON object")
    return fields


class BatchJobs:
    """The requests of a file as jobs of a store."""

    def __init__(self, lines: Sequence[Line], store: Store) -> None:
        self._lines = lines
        self._store = store
        wanted: list[tuple[Task, int, str | None]] = [
            (task, 0, key)
            for line in lines
            if line.query
            for task, key in zip(line.query.tasks, line.keys(), strict=True)
        ]
        ids = iter(job.id for job in store.submit_all(wanted))
        self._ids = [list(itertools.islice(ids, len(line.keys()))) for line in lines]
        # Removes jobs of an earlier run with another file.
        store.keep({id_ for ids_ in self._ids for id_ in ids_})
        # The cause of the failure may be gone.
        for job in store.jobs(("failed",)):
            store.retry(job.id)

    @property
    def jobs(self) -> int:
        return sum(map(len, self._ids))

    @property
    def ended(self) -> int:
        counts = self._store.count()
        return sum(counts[state] for state in FINAL)

    def records(self) -> Iterator[dict[str, Any]]:
        """The answers, in the order of the requests."""
        for line, ids in zip(self._lines, self._ids, strict=True):
            yield self._record(line, [self._store.get(id_) for id_ in ids])

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
    lines = []
    errors = 0
    for record in records:
        errors += record["error"] is not None
        lines.append(json.dumps(record, ensure_ascii=False))
    write_private(path, "".join(f"{line}\n" for line in lines).encode())
    return len(lines), errors


def work_path(output: Path) -> Path:
    """The path of the store for the batch whose answers go to `output`."""
    name = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]
    return state_dir() / "batches" / f"{name}.db"


def remove(path: Path) -> None:
    """Removes a store's files."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)

"""A file of requests in OpenAI's batch format, read line by line: it may be larger than memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from split_common.errors import ConfigError, SplitError
from split_common.system.files import private_dir, state_dir
from split_common.system.text import parse_json, without_mark
from split_device.jobs.job import ModelChoice
from split_device.openai.fields import ApiError
from split_device.openai.requests import COMPLETION_PATHS, Query, parse

#: Largest line, in bytes: as large as the body of a request may be.
MAX_LINE = 4 * 1024**2


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
    #: The line's length in bytes.
    size: int

    def keys(self) -> list[str]:
        """Keys of the request's jobs, one for each choice."""
        return [f"{self.digest}/{choice}" for choice in range(len(self.query.tasks) if self.query else 0)]


class Requests:
    """A file of requests. Iterating reads it from the beginning, and yields its lines, except empty ones.

    Only a line feed ends a line. Not thread-safe.
    """

    def __init__(self, path: Path, file: IO[bytes], model: ModelChoice) -> None:
        self.path = path
        self._file = file
        self._model = model

    def __iter__(self) -> Iterator[Line]:
        self._file.seek(0)
        seen: set[bytes] = set()
        for number, text in enumerate(self._texts(), 1):
            if text is None or text.strip():
                yield _line(number, text, self._model, seen)

    def _texts(self) -> Iterator[bytes | None]:
        """The lines; None for one that is too long."""
        first = True
        while text := self._file.readline(MAX_LINE + 1):
            whole = len(text) <= MAX_LINE
            while not text.endswith(b"\n") and (rest := self._file.readline(MAX_LINE)):
                text, whole = rest, False
            if first:
                text, first = without_mark(text, str(self.path)), False
            yield text if whole else None


@contextlib.contextmanager
def open_requests(path: Path, model: ModelChoice) -> Iterator[Requests]:
    """Opens a file of requests; of a pipe, all is copied to an unnamed file first.

    Raises:
        ConfigError: it cannot be read, is not text in UTF-8, or has no lines.
    """
    with contextlib.ExitStack() as stack:
        try:
            file: IO[bytes] = stack.enter_context(path.open("rb"))
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                copy = stack.enter_context(tempfile.TemporaryFile(dir=private_dir(state_dir())))
                shutil.copyfileobj(file, copy)
                file = copy
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        file.seek(0)
        if b"\0" in without_mark(file.readline(MAX_LINE), str(path)):
            raise ConfigError(f"{path} is not text: it has a NUL byte")
        requests = Requests(path, file, model)
        if next(iter(requests), None) is None:
            raise ConfigError(f"{path} has no lines")
        yield requests


def _line(number: int, text: bytes | None, model: ModelChoice, seen: set[bytes]) -> Line:
    """A line, parsed; adds a digest of its `custom_id` to `seen`."""
    custom_id: str | None = None
    query: Query | None = None
    failure: dict[str, Any] | None = None
    try:
        fields = _fields(text)
        given = fields.get("custom_id")
        if not isinstance(given, str) or not given:
            raise BadLine("custom_id is missing, or is not a string")
        custom_id = given
        name = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        if name in seen:
            raise BadLine(f"an earlier line has the custom_id {custom_id!r}")
        seen.add(name)
        query = _query(fields, model)
    except ApiError as error:
        failure = {"code": error.code or error.type, "message": f"line {number}: {error}"}
    except BadLine as error:
        failure = {"code": "invalid_request", "message": f"line {number}: {error}"}
    settings = msgspec.json.encode((custom_id, model, query.tasks if query else ()))
    return Line(number, custom_id, query, failure, hashlib.sha256(settings).hexdigest(), len(text or b""))


def _query(fields: dict[str, Any], model: ModelChoice) -> Query:
    """Raises BadLine or ApiError for a request that a batch does not answer."""
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
    return query


def _fields(text: bytes | None) -> dict[str, Any]:
    if text is None:
        raise BadLine(f"the line has more than {MAX_LINE} bytes")
    try:
        fields = parse_json(text, "the line")
    except ConfigError as error:
        raise BadLine(str(error)) from None
    if not isinstance(fields, dict):
        raise BadLine("the line is not a JSON object")
    return fields

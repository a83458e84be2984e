"""Lines of a batch: what each one asks for, in which form it is answered, and what identifies it across runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from split_common.errors import ConfigError, SplitError
from split_common.system.text import parse_json
from split_device.batches.source import MAX_LINE, RawLine
from split_device.jobs.job import AnyTask
from split_device.serving.openai.query import CompletionForm

#: How a line is answered: as OpenAI's chat, text or images, or in the short form of a prompt's text or picture.
AnswerKind = Literal["chat", "text", "images", "prompt", "picture"]


class BadLine(SplitError):
    """A line that is not a valid request."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a line until it is answered."""

    number: int
    #: The line's own id, or else its number.
    name: str | None
    kind: AnswerKind = "prompt"
    #: The model's name as the line has it.
    model: str = ""
    #: Why it cannot be answered.
    error: dict[str, Any] | None = None
    #: Identifies the request across runs, wherever it is in the file.
    digest: str = ""
    #: Ids of its jobs, one for each choice.
    jobs: tuple[str, ...] = ()
    #: A table's row.
    row: dict[str, str] | None = None
    #: Names of its pictures' files, one for each choice.
    files: tuple[str, ...] = ()
    #: Whether the files carry the pictures' settings.
    metadata: bool = False
    #: How a completion is written.
    form: CompletionForm | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True)
class Line:
    """A line with its tasks, one for each choice. `size` is its length in bytes."""

    entry: Entry
    tasks: tuple[AnyTask, ...]
    size: int

    def keys(self) -> list[str]:
        """Keys of the line's jobs."""
        return [f"{self.entry.digest}/{choice}" for choice in range(len(self.tasks))]


class Names:
    """The ids of the lines so far, as digests, and how often each request without one came."""

    def __init__(self) -> None:
        self._named: set[bytes] = set()
        self._counts: dict[bytes, int] = {}

    def add(self, kind: str, name: str) -> None:
        """Raises BadLine if an earlier line has the same id; `kind` is what the id is called."""
        digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
        if digest in self._named:
            raise BadLine(f"an earlier line has the {kind} {name!r}")
        self._named.add(digest)

    def digest(self, tasks: Sequence[AnyTask]) -> str:
        """Identifies a request without an id by what it asks for, and by how many before it asked for the same."""
        settings = msgspec.json.encode(tasks)
        plain = hashlib.blake2b(settings, digest_size=16).digest()
        count = self._counts[plain] = self._counts.get(plain, 0) + 1
        return hashlib.sha256(b"%d\0%b" % (count, settings)).hexdigest()


def bad_line(raw: RawLine, name: str | None, code: str, error: Exception, kind: AnswerKind) -> Line:
    """A line that cannot be answered."""
    digest = hashlib.sha256(b"%d\0%b" % (raw.number, raw.text or b"")).hexdigest()
    failure = {"code": code, "message": f"line {raw.number}: {error}"}
    entry = Entry(number=raw.number, name=name, kind=kind, error=failure, digest=digest, row=raw.row)
    return Line(entry, (), len(raw.text or b""))


def object_of(text: bytes | None) -> dict[str, Any]:
    """The JSON object on a line. Raises BadLine."""
    try:
        fields = parse_json(whole(text), "the line")
    except ConfigError as error:
        raise BadLine(str(error)) from None
    if not isinstance(fields, dict):
        raise BadLine("the line is not a JSON object")
    return fields


def whole(text: bytes | None) -> bytes:
    """The line's bytes. Raises BadLine if it was too long to be read."""
    if text is None:
        raise BadLine(f"the line has more than {MAX_LINE} bytes")
    return text

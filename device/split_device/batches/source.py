"""The file that a batch reads: which form its lines have, and their bytes or fields one after the other.

It may be larger than memory, and it is read once, so it may be a pipe.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from split_common.errors import ConfigError
from split_common.system.console import check_stdin
from split_common.system.text import parse_json, without_mark

#: What a line is: a request as in OpenAI's batches, an object with a prompt, a prompt, or a row of a table.
InputForm = Literal["openai", "prompts", "text", "csv"]

#: Largest line, in bytes: as large as the body of a request may be.
MAX_LINE = 4 * 1024**2

#: Lines that are read to find one that is not damaged, and says what lines are.
LOOK_AHEAD = 64

#: Forms that a file's suffix settles.
_TABLES = (".csv", ".tsv")
_TEXTS = (".txt", "-")
_JSON = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class RawLine:
    """A line as it is in the file. `number` counts lines, or the rows of a table, from 1."""

    number: int
    #: The line; None if it is too long.
    text: bytes | None
    #: A table's row, by the names of its columns. What is missing is empty.
    row: dict[str, str] | None = None
    #: Whether the row has as many fields as the table has columns.
    regular: bool = True


class Source:
    """An open file of lines. Iterating yields those that are not empty; it can be done once."""

    def __init__(self, path: Path, file: IO[bytes], form: InputForm | None, templated: bool) -> None:
        self.path = path
        self.name = "stdin" if str(path) == "-" else str(path)
        self._file = file
        #: Lines that were read to find out the form.
        self._ahead: list[bytes | None] = []
        first = self._first()
        self.form: InputForm = form or self._found_form(first, templated)
        #: Names of a table's columns.
        self.columns: list[str] = []
        if self.form == "csv":
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            # Strict, because a quote without its end would swallow the rest of the file.
            self._rows = csv.reader(self._texts(), delimiter=delimiter, strict=True)
            self.columns = self._header()

    def __iter__(self) -> Iterator[RawLine]:
        if self.form == "csv":
            yield from self._table()
            return
        for number, text in enumerate(self._lines(), 1):
            if text is None or text.strip():
                yield RawLine(number, text)

    def _first(self) -> bytes | None:
        """The first line that is not empty; None if it is too long.

        Raises:
            ConfigError: the file is not text, or has no lines.
        """
        for text in self._read():
            if text is not None and not self._ahead:
                text = without_mark(text, self.name)
                if b"\0" in text:
                    raise ConfigError(f"{self.name} is not text: it has a NUL byte")
            self._ahead.append(text)
            if text is None or text.strip():
                return text
        raise ConfigError(f"{self.name} has no lines")

    def _found_form(self, first: bytes | None, templated: bool) -> InputForm:
        """What the lines are, by the file's suffix, and by the first of them that is an object.

        Raises:
            ConfigError: it cannot be told.
        """
        suffix = "-" if self.name == "stdin" else self.path.suffix.lower()
        if suffix in _TABLES:
            return "csv"
        braced = first is not None and first.lstrip().startswith(b"{")
        objects = suffix in _JSON or (suffix != ".txt" and (first is None or braced))
        form = _form_of(fields := _object(first), templated)
        if objects and fields is None:
            # A line that is damaged says nothing about the others.
            for text in itertools.islice(self._read(), LOOK_AHEAD):
                self._ahead.append(text)
                if (form := _form_of(_object(text), templated)) is not None:
                    break
        if form is not None:
            return form
        if suffix in _TEXTS:
            return "text"
        if suffix in _JSON or braced:
            return "openai"
        if first is None:
            raise ConfigError(f"{self.name}: its first line has more than {MAX_LINE} bytes")
        raise ConfigError(
            f"{self.path}: unknown format of its lines: give --input-format text if each is a prompt, or csv"
        )

    def _lines(self) -> Iterator[bytes | None]:
        yield from self._ahead
        yield from self._read()

    def _read(self) -> Iterator[bytes | None]:
        """Lines of the file; None for one that is too long. Only a line feed ends a line.

        Raises:
            ConfigError: one that is too long is not text, and may have no end: that of a device, say.
        """
        while text := self._file.readline(MAX_LINE + 1):
            whole = len(text) <= MAX_LINE
            if not whole and b"\0" in text:
                raise ConfigError(f"{self.name} is not text: it has a NUL byte")
            while not text.endswith(b"\n") and (rest := self._file.readline(MAX_LINE)):
                text, whole = rest, False
            yield text if whole else None

    # --- tables --------------------------------------------------------------------------------------------

    def _texts(self) -> Iterator[str]:
        for number, text in enumerate(self._lines(), 1):
            if text is None:
                raise ConfigError(f"{self.name}, line {number} has more than {MAX_LINE} bytes")
            if b"\0" in text:
                raise ConfigError(f"{self.name}, line {number} is not text: it has a NUL byte")
            try:
                yield text.decode()
            except UnicodeDecodeError:
                raise ConfigError(f"{self.name}, line {number} is not UTF-8: save it as UTF-8") from None

    def _header(self) -> list[str]:
        columns = next(self._fields())
        doubled = {column for column in columns if columns.count(column) > 1}
        if doubled:
            raise ConfigError(f"{self.name} has two columns {doubled.pop()!r}: rename one")
        return columns

    def _table(self) -> Iterator[RawLine]:
        for number, fields in enumerate(self._fields(), 1):
            row = dict.fromkeys(self.columns, "") | dict(zip(self.columns, fields, strict=False))
            yield RawLine(number, "\0".join(fields).encode(), row, len(fields) == len(self.columns))

    def _fields(self) -> Iterator[list[str]]:
        """The rows, except empty ones."""
        csv.field_size_limit(MAX_LINE)
        while True:
            try:
                fields = next(self._rows)
            except StopIteration:
                return
            except csv.Error as error:
                raise ConfigError(f"{self.name}, line {self._rows.line_num} is not CSV: {error}") from None
            if fields:
                yield fields


@contextlib.contextmanager
def open_source(path: Path, form: InputForm | None = None, templated: bool = False) -> Iterator[Source]:
    """Opens a file of lines; `-` is stdin.

    Args:
        form: what the lines are; None to go by the file's suffix and its first line.
        templated: whether prompts come from a template, so that any object may be a line of prompts.

    Raises:
        ConfigError: it cannot be read, is not text in UTF-8, has no lines, or what they are cannot be told.
    """
    if str(path) == "-":
        check_stdin()
        data = getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode())
        yield Source(path, data, form, templated)
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            source = Source(path, file, form, templated)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        yield source


def _object(line: bytes | None) -> dict[str, Any] | None:
    """The JSON object on a line; None if it is none, or too long."""
    try:
        fields = parse_json(line or b"", "the line")
    except ConfigError:
        return None
    return fields if isinstance(fields, dict) else None


def _form_of(fields: dict[str, Any] | None, templated: bool) -> InputForm | None:
    """What a line with an object is; None if its fields do not tell."""
    if fields is None:
        return None
    if fields.keys() & {"body", "url", "method"}:
        return "openai"
    return "prompts" if fields.keys() & {"prompt", "messages"} or templated else None

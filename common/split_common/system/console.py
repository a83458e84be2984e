"""What commands read and print: results on stdout, everything else on stderr."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from split_common.errors import ConfigError
from split_common.system.text import decode_text, for_terminal, json_line


class _PlainConsole(Console):
    """A console for text of any origin: it is not read as markup, and a terminal obeys nothing in it."""

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(for_terminal(text), **options)


#: Progress, notices and errors; stdout is for results only.
stderr = _PlainConsole(stderr=True)


def stdout() -> Console:
    """A console for results that are tables or lists. Not kept, because `sys.stdout` may be redirected."""
    return _PlainConsole()


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Says on stderr what is being done: in a terminal by a line that vanishes at the end, elsewhere for good.

    Args:
        what: e.g. "loading the model".
    """
    line = Text(f"{for_terminal(what)} …")
    if not stderr.is_terminal or stderr.is_dumb_terminal:
        stderr.print(line, soft_wrap=True)
        yield
        return
    # stdout stays as it is: it may be a file.
    with Live(Spinner("dots", line), console=stderr, transient=True, redirect_stdout=False):
        yield


@contextlib.contextmanager
def saying_stop(what: str) -> Iterator[None]:
    """Says on stderr that a command stops, when a block that waits for a signal ends, also by Ctrl-C.

    Args:
        what: becomes of what the command serves, e.g. "sessions continue when a broker is back".
    """
    try:
        yield
    except KeyboardInterrupt:
        # Whoever has started the command may be gone, and nobody reads.
        with contextlib.suppress(OSError):
            stderr.print(f"stopping: {what}", soft_wrap=True)
        raise
    stderr.print(f"stopping: {what}", soft_wrap=True)


def prepare_output() -> None:
    """Lets stdout and stderr take any text: what their encoding lacks is escaped, e.g. as `\\u4f60`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # The process was started with the descriptor closed.
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (open as long as the process runs)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def check_stdin() -> None:
    """Raises ConfigError if there is no stdin, because whoever started the process has closed it."""
    if sys.stdin is None:
        raise ConfigError("stdin is closed: give the prompt in another way")


def read_stdin() -> str:
    """All text of stdin. Raises ConfigError if it is closed, or not text in stdin's encoding."""
    check_stdin()
    data = getattr(sys.stdin, "buffer", None)
    return decode_text(data.read(), "stdin", stdin_encoding()) if data is not None else sys.stdin.read()


def piped_lines() -> Iterator[str]:
    """The lines of stdin as they come, without blanks around them. Only a line feed ends a line.

    Raises:
        ConfigError: stdin is closed, or not text in its encoding.
    """
    check_stdin()
    encoding = stdin_encoding()
    for number, line in enumerate(getattr(sys.stdin, "buffer", sys.stdin), 1):
        if isinstance(line, bytes):
            yield decode_text(line, f"line {number} of stdin", encoding).strip()
        else:
            yield line.strip()


def stdin_encoding() -> str:
    """The encoding of stdin: UTF-8, unless the locale or PYTHONIOENCODING has another one."""
    name = codecs.lookup(getattr(sys.stdin, "encoding", None) or "utf-8").name
    return "utf-8" if name == "ascii" else name


def print_text(text: str, end: str = "\n", stream: TextIO | None = None) -> None:
    """Prints a model's text at once; for a terminal, without the control characters that it would obey.

    Args:
        stream: where to print; None for stdout.
    """
    stream = stream or sys.stdout
    print(for_terminal(text) if stream.isatty() else text, end=end, file=stream, flush=True)


def emit_json(obj: object) -> None:
    """Prints an object as one line of JSON on stdout."""
    line = json_line(obj)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(obj)
    print(line, file=sys.stdout, flush=True)

"""What commands show while they work: what they load, answers as they come, progress."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator

from split_common.models.checkpoint_files import model_name
from split_common.system.console import doing, print_text, stderr
from split_common.transport.address import masked
from split_device.jobs import waits
from split_device.sessions.connection import Connection


def loading(connection: Connection, *names: str | None) -> contextlib.AbstractContextManager[None]:
    """Says that models are being loaded, and which queue is joined. Enter it before torch is imported.

    Args:
        names: directories, hub ids or names of the models; None for no model.
    """
    models = " and ".join(model_name(name) for name in names if name)
    return doing(f"loading {models}, connecting to {masked(connection.broker)}")


#: Whether a line of an answer has begun in stdout and not ended.
_line_is_open = False


def with_notices(connection: Connection) -> Connection:
    """The connection, with lines on stderr about workers that are lost, waited for and found."""
    return dataclasses.replace(connection, on_notice=print_notice)


def waiting_for_workers(connection: Connection) -> Connection:
    """The same for a person who may start the worker after the command."""
    return dataclasses.replace(with_notices(connection), wait_for_first=True)


def print_notice(text: str) -> None:
    """Prints what is said of workers on stderr, on a line of its own."""
    if _line_is_open and sys.stdout.isatty():
        stderr.print()
    stderr.print(text, soft_wrap=True)


class AgentNotices:
    """Passes on what the agent says of workers, each line once."""

    def __init__(self) -> None:
        self._told = ""

    def show(self) -> None:
        if (notice := waits.said()) not in ("", self._told):
            self._told = notice
            print_notice(notice)


@contextlib.contextmanager
def answer_line(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Yields a function that prints text as it arrives. Ends the line afterwards, also after an error."""
    global _line_is_open

    def print_now(text: str) -> None:
        global _line_is_open
        if not quiet:
            _line_is_open = True
            print_text(text, end="")

    try:
        yield print_now
    finally:
        if _line_is_open:
            _line_is_open = False
            print(flush=True)


@contextlib.contextmanager
def answer_lines(quiet: bool) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Yields functions that print an answer on stdout, and what the model thinks before it, dim, on stderr."""
    thinking = False
    with answer_line(quiet) as print_answer:

        def end_thinking() -> None:
            nonlocal thinking
            if thinking:
                stderr.print()
            thinking = False

        def print_now(text: str) -> None:
            end_thinking()
            print_answer(text)

        def print_thinking(text: str) -> None:
            nonlocal thinking
            if not quiet:
                thinking = True
                stderr.print(text, style="dim", end="", soft_wrap=True)

        try:
            yield print_now, print_thinking
        finally:
            end_thinking()


@contextlib.contextmanager
def step_progress(steps: int, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; yields a function of the number of steps done, and of all steps."""
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=stderr,
        transient=True,
        disable=quiet or not stderr.is_terminal,
    ) as bar:
        task = bar.add_task("steps", total=steps)
        yield lambda done, total: bar.update(task, completed=done, total=total)

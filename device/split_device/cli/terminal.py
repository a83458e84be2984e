"""Answers and progress in a terminal, while they come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from split_common.system.console import stderr


@contextlib.contextmanager
def answer_line(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Prints an answer as it comes, and ends its line, however the answer ends."""
    begun = False

    def print_now(text: str) -> None:
        nonlocal begun
        if not quiet:
            begun = True
            print(text, end="", flush=True)

    try:
        yield print_now
    finally:
        if begun:
            print(flush=True)


@contextlib.contextmanager
def step_progress(steps: int, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; yields a function that takes the steps that are done, and all steps."""
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

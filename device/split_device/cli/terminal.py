"""Streams answers and progress to a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from split_common.system.console import print_text, stderr


@contextlib.contextmanager
def answer_line(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Yields a function that prints text as it arrives. Ends the line afterwards, also after an error."""
    begun = False

    def print_now(text: str) -> None:
        nonlocal begun
        if not quiet:
            begun = True
            print_text(text, end="")

    try:
        yield print_now
    finally:
        if begun:
            print(flush=True)


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

"""How far a batch is, on stderr: a bar on a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from split_common.system.console import stderr

ProgressMode = Literal["auto", "bar", "lines", "none"]

#: Interval between two lines, in seconds.
LINE_INTERVAL = 60.0

#: Interval between two counts of the tokens, for which the whole store is read, in seconds.
COUNT_INTERVAL = 5.0

#: Called with the number of answers that are there, and how many of them are errors.
Advance = Callable[[int, int], None]


class Rate:
    """Tokens a second since it was made.

    Args:
        tokens: counts all tokens so far.
    """

    def __init__(self, tokens: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens, self._clock = tokens, clock
        self._began, self._before = clock(), tokens()
        self._counted = self._began
        self._rate = 0.0

    def __call__(self) -> float:
        now = self._clock()
        if now - self._counted > COUNT_INTERVAL:
            self._rate = (self._tokens() - self._before) / (now - self._began)
            self._counted = now
        return self._rate


@contextlib.contextmanager
def batch_progress(mode: ProgressMode, name: str, total: int, tokens: Callable[[], int]) -> Iterator[Advance]:
    """Yields a function that shows how many of `total` answers are there.

    Args:
        name: what the batch is called.
        tokens: counts all tokens so far.
    """
    if mode == "auto":
        mode = "bar" if stderr.is_terminal else "lines"
    rate = Rate(tokens)
    if mode == "bar":
        with _bar(total, rate) as advance:
            yield advance
    elif mode == "lines":
        yield Lines(name, total, rate)
    else:
        yield lambda _done, _failed: None


@contextlib.contextmanager
def _bar(total: int, rate: Rate) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]}{task.fields[rate]:.1f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr) as progress:
        task = progress.add_task("answering", total=total, rate=0.0, failed="")

        def advance(done: int, failed: int) -> None:
            words = f"{failed} failed, " if failed else ""
            progress.update(task, completed=done, rate=rate(), failed=words)

        yield advance


class Lines:
    """Prints a line at once, and then one a minute.

    Args:
        name: what the batch is called.
        total: the number of answers.
    """

    def __init__(
        self, name: str, total: int, rate: Callable[[], float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._total, self._rate, self._clock = name, total, rate, clock
        self._began = clock()
        self._next = self._began
        self._before: int | None = None

    def __call__(self, done: int, failed: int) -> None:
        now = self._clock()
        if self._before is None:
            self._before = done
        if now < self._next:
            return
        self._next = now + LINE_INTERVAL
        words = [f"{done} of {self._total}"]
        if failed:
            words.append(f"{failed} failed")
        if rate := self._rate():
            words.append(f"{rate:.1f} tokens/s")
        if made := done - self._before:
            words.append(f"about {_duration((self._total - done) * (now - self._began) / made)} left")
        stderr.print(f"{self._name}: {', '.join(words)}", soft_wrap=True)


def _duration(seconds: float) -> str:
    """A time like `40 s`, `12 min` or `3.5 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"

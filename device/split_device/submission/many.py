"""Many jobs from Python: submitted together, and waited for together, in order or as they end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from split_common.errors import AgentError, JobsError
from split_device.jobs.agent import running_agent
from split_device.jobs.follow import AGENT_GRACE, POLL_INTERVAL
from split_device.jobs.job import FINAL, Job, Selection
from split_device.jobs.store import Store, store_path

_T = TypeVar("_T")

#: Most jobs that one query of the store asks about.
QUERY_JOBS = 500

#: Error message: jobs would wait for ever.
NO_AGENT = "no agent is running: `lambda-split agent start` starts one"

#: Shows how far the jobs are: True for a bar on stderr; or called with the number that have ended, and of all.
OnProgress = bool | Callable[[int, int], None]


class _Waiting(Generic[_T]):
    """The jobs that have not ended, and the outputs of those that have. Use it on one thread, and close it."""

    def __init__(
        self, ids: Sequence[str], store_key: Path | None, output: Callable[[Store, Job], _T], timeout: float | None
    ) -> None:
        self._store = Store(store_path(), store_key)
        self._output = output
        self._timeout = timeout
        self._began = self._agent_at = time.monotonic()
        #: By id, the places of a job among the prompts: prompts with one key have one job.
        self._pending: dict[str, list[int]] = {}
        for index, id_ in enumerate(ids):
            self._pending.setdefault(id_, []).append(index)

    def __bool__(self) -> bool:
        return bool(self._pending)

    def close(self) -> None:
        self._store.close()

    def ended(self) -> Iterator[tuple[int, _T | JobsError]]:
        """What has ended since the last call: places, and outputs or the errors of jobs without one.

        Raises:
            UnknownJob: a job was removed.
            AgentError: no agent runs.
            TimeoutError: the time is over.
        """
        found = False
        for some in _slices(list(self._pending), QUERY_JOBS):
            for id_ in self._store.ids(Selection(ids=tuple(some), states=FINAL)):
                found = True
                outcome = self._outcome(self._store.get(id_))
                for index in self._pending.pop(id_):
                    yield index, outcome
        if self._pending and not found:
            self._check()

    def _outcome(self, job: Job) -> _T | JobsError:
        try:
            return self._output(self._store, job)
        except JobsError as error:
            return error

    def _check(self) -> None:
        now = time.monotonic()
        self._store.get(next(iter(self._pending)))
        if running_agent() is not None:
            self._agent_at = now
        elif now - self._agent_at > AGENT_GRACE:
            raise AgentError(NO_AGENT)
        if self._timeout is not None and now - self._began > self._timeout:
            raise TimeoutError(f"{len(self._pending)} jobs have not ended after {self._timeout:g} s")


class SubmittedMany(Generic[_T]):
    """Jobs in the store, in the order of their prompts. Awaiting it, like `result`, gives their outputs.

    Iterating, with `for` or `async for`, gives `(index, output)` as jobs end. If a job failed or was cancelled,
    its output is a `JobsError`. Waiting again begins with the first job.
    """

    def __init__(self, ids: Sequence[str], store_key: Path | None, output: Callable[[Store, Job], _T]) -> None:
        #: The ids of the jobs, which are their request ids.
        self.ids = list(ids)
        self._store_key = store_key
        self._output = output

    def __len__(self) -> int:
        return len(self.ids)

    def cancel(self) -> None:
        """Cancels the jobs that have not ended."""
        with Store(store_path(), self._store_key) as store:
            store.cancel_all(dict.fromkeys(self.ids), lambda: running_agent() is None)

    def as_completed(self, timeout: float | None = None) -> Iterator[tuple[int, _T | JobsError]]:
        """Yields `(index, output)` as jobs end. An output is the error of a job that did not succeed.

        Args:
            timeout: how long to wait for all, in seconds; None for no limit.

        Raises:
            AgentError: no agent runs. The jobs stay in the store.
            UnknownJob: a job was removed.
            TimeoutError: a job has not ended in time.
        """
        with contextlib.closing(self._waiting(timeout)) as waiting:
            while waiting:
                yield from waiting.ended()
                if waiting:
                    time.sleep(POLL_INTERVAL)

    def result(
        self, timeout: float | None = None, *, return_exceptions: bool = False, progress: OnProgress = False
    ) -> list[_T]:
        """Waits for all outputs, in the order of the prompts.

        Args:
            timeout: how long to wait, in seconds; None for no limit.
            return_exceptions: whether the error of a job that did not succeed is among the outputs, as in
                `asyncio.gather`. Otherwise the first one is raised.
            progress: True shows a bar on stderr; a function is called with the number of jobs that have ended, and
                of all.

        Raises:
            JobsError: a job failed or was cancelled.
            AgentError, UnknownJob, TimeoutError: as `as_completed`.
        """
        with _Collected[_T](len(self), return_exceptions, progress) as collected:
            for index, outcome in self.as_completed(timeout):
                collected.add(index, outcome)
            return collected.outputs()

    async def aresult(
        self, timeout: float | None = None, *, return_exceptions: bool = False, progress: OnProgress = False
    ) -> list[_T]:
        """As `result`, for an event loop."""
        with _Collected[_T](len(self), return_exceptions, progress) as collected:
            async with contextlib.aclosing(self._aiter(timeout)) as found:
                async for index, outcome in found:
                    collected.add(index, outcome)
            return collected.outputs()

    def __iter__(self) -> Iterator[tuple[int, _T | JobsError]]:
        return self.as_completed()

    def __aiter__(self) -> AsyncIterator[tuple[int, _T | JobsError]]:
        return self._aiter(None)

    def __await__(self) -> Generator[Any, None, list[_T]]:
        return self.aresult().__await__()

    async def _aiter(self, timeout: float | None) -> AsyncGenerator[tuple[int, _T | JobsError], None]:
        with contextlib.closing(self._waiting(timeout)) as waiting:
            while waiting:
                for ended in waiting.ended():
                    yield ended
                if waiting:
                    await asyncio.sleep(POLL_INTERVAL)

    def _waiting(self, timeout: float | None) -> _Waiting[_T]:
        return _Waiting(self.ids, self._store_key, self._output, timeout)


class _Collected(Generic[_T]):
    """The outputs so far, and the bar that shows their number."""

    def __init__(self, total: int, return_exceptions: bool, progress: OnProgress) -> None:
        self._outputs: dict[int, Any] = {}
        self._total = total
        self._return_exceptions = return_exceptions
        self._stack = contextlib.ExitStack()
        self._progress = progress

    def __enter__(self) -> _Collected[_T]:
        self._show = self._stack.enter_context(_bar(self._total)) if self._progress is True else self._progress
        self._report()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, index: int, outcome: _T | JobsError) -> None:
        """Takes an output. Raises the error of a job that did not succeed, unless errors are returned."""
        if isinstance(outcome, JobsError) and not self._return_exceptions:
            raise outcome
        self._outputs[index] = outcome
        self._report()

    def outputs(self) -> list[_T]:
        return [self._outputs[index] for index in range(self._total)]

    def _report(self) -> None:
        if callable(self._show):
            self._show(len(self._outputs), self._total)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from split_common.system.console import stderr

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr) as bar:
        task = bar.add_task("jobs", total=total)
        yield lambda done, _total: bar.update(task, completed=done)


class SubmitsMany(Generic[_T]):
    """What submits many prompts: a device. Subclasses define `submit_many`."""

    def submit_many(self, prompts: Iterable[Any], **options: Any) -> SubmittedMany[_T]:
        raise NotImplementedError

    def generate_many(
        self,
        prompts: Iterable[Any],
        *,
        timeout: float | None = None,
        return_exceptions: bool = False,
        progress: OnProgress = False,
        **options: Any,
    ) -> list[_T]:
        """Submits prompts, and waits for their outputs, which come in the order of the prompts.

        If it ends in any other way (an error, Ctrl-C), the jobs that have not ended are cancelled.

        Args:
            timeout, return_exceptions, progress: see `SubmittedMany.result`.
            options: of `submit_many`.

        Raises:
            AgentError: no agent runs. If none ran from the start, nothing was submitted.
            JobsError, UnknownJob, TimeoutError: see `SubmittedMany.result`.
            ConfigError, StoreLocked: see `submit_many`.
        """
        many = self._submitted(prompts, options)
        with _cancelled_on_error(many):
            return many.result(timeout, return_exceptions=return_exceptions, progress=progress)

    async def agenerate_many(
        self,
        prompts: Iterable[Any],
        *,
        timeout: float | None = None,
        return_exceptions: bool = False,
        progress: OnProgress = False,
        **options: Any,
    ) -> list[_T]:
        """As `generate_many`, for an event loop. If the task is cancelled, so are the jobs that have not ended."""
        many = self._submitted(prompts, options)
        with _cancelled_on_error(many):
            return await many.aresult(timeout, return_exceptions=return_exceptions, progress=progress)

    def _submitted(self, prompts: Iterable[Any], options: dict[str, Any]) -> SubmittedMany[_T]:
        if running_agent() is None:
            raise AgentError(NO_AGENT)
        return self.submit_many(prompts, **options)


@contextlib.contextmanager
def _cancelled_on_error(many: SubmittedMany[Any]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        many.cancel()
        raise


def _slices(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (ids[begin : begin + size] for begin in range(0, len(ids), size))

"""The answers of a batch's lines, as they are in its store."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from split_device.batches.lines import Entry
from split_device.batches.plan import Plan
from split_device.jobs.job import FINAL, ImageTask, Job, JobProgress, Task
from split_device.jobs.store import Store
from split_device.serving.choices import Choice


@dataclass(frozen=True)
class Result:
    """What became of a line: its answer, or the error."""

    entry: Entry
    #: The line's jobs; empty for a line that could not be parsed.
    jobs: list[Job]
    choices: list[Choice]
    #: What makes the prompt of each choice, as far as it is told.
    prompts: list[Callable[[], Choice]]
    #: `code` and `message` of the error.
    error: dict[str, Any] | None

    @property
    def prompt(self) -> str | None:
        """The prompt, or the last message of a conversation; None if the line could not be parsed."""
        if not self.jobs:
            return None
        task = self.jobs[0].task
        if isinstance(task, Task) and not isinstance(task.prompt, str):
            return task.prompt[-1].content
        return task.prompt if isinstance(task.prompt, str) else None


@dataclass
class Summary:
    """Counts of results."""

    lines: int = 0
    errors: int = 0
    #: Number of errors by their codes.
    reasons: Counter[str] = field(default_factory=Counter)
    first_error: str | None = None

    def add(self, result: Result) -> None:
        self.lines += 1
        if result.error is not None:
            self.errors += 1
            self.reasons[str(result.error["code"])] += 1
            if self.first_error is None:
                where, message = f"line {result.entry.number}: ", str(result.error["message"])
                self.first_error = message if message.startswith(where) else where + message


def results(plan: Plan, store: Store, *, ended: bool = False) -> Iterator[Result]:
    """The results of all lines, in their order.

    Args:
        ended: leaves out lines that are not done.
    """
    for entry in plan.entries():
        jobs = [store.get(id_) for id_ in entry.jobs]
        if not ended or all(job.state in FINAL for job in jobs):
            yield _result(entry, jobs, store)


def _result(entry: Entry, jobs: list[Job], store: Store) -> Result:
    error = entry.error
    for job in jobs:
        if error is None and job.state != "succeeded":
            error = _error(job)
    if error is not None or isinstance(jobs[0].task, ImageTask):
        return Result(entry, jobs, [], [], error)
    found = [store.progress(job.id) for job in jobs]
    choices = [_choice(job, progress) for job, progress in zip(jobs, found, strict=True)]
    prompts = [functools.partial(_prompt, job, progress) for job, progress in zip(jobs, found, strict=True)]
    return Result(entry, jobs, choices, [*prompts], None)


def _choice(job: Job, progress: JobProgress) -> Choice:
    reason = job.finish_reason or "length"
    scored = isinstance(job.task, Task) and isinstance(job.task.logprobs, int)
    logprobs = list(progress.logprobs) if scored else None
    return Choice(progress.text, job.tokens, reason, logprobs, progress.reasoning, progress.tool_calls)


def _prompt(job: Job, progress: JobProgress) -> Choice:
    text = job.task.prompt if isinstance(job.task.prompt, str) else ""
    return Choice(text or progress.prompt, 0, None, list(progress.prompt_logprobs) or None)


def _error(job: Job) -> dict[str, str]:
    name, _, message = (job.error or f"the job was {job.state}").partition(": ")
    return {"code": name, "message": message} if message else {"code": job.state, "message": name}

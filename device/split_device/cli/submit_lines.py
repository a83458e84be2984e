"""`submit --each-line`: a job for each line of a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from split_common.errors import ConfigError, SplitError
from split_common.system.console import emit_json, stderr
from split_device.batches.lines import Line
from split_device.batches.parsing import parsed
from split_device.batches.settings import BatchSettings
from split_device.batches.source import InputForm, open_source
from split_device.batches.work import slices
from split_device.jobs.hooks import Action
from split_device.jobs.job import AnyTask
from split_device.jobs.store import Store


@dataclass(frozen=True)
class LineJobs:
    """What the jobs of all lines have in common.

    Args:
        key: the beginning of their keys, which end with the number of the line.
        actions: what is to happen when the group has ended; without a group, when each job has.
    """

    priority: int
    key: str | None
    group: str | None
    actions: list[Action]

    def entries(self, lines: list[Line]) -> Iterator[tuple[AnyTask, int, str | None]]:
        """A job for each line, as the store takes it."""
        for line in lines:
            for task in line.tasks:
                key = None if self.key is None else f"{self.key}-{line.entry.number}"
                yield task, self.priority, key


def submit_lines(
    store: Store, path: Path, form: InputForm | None, settings: BatchSettings, jobs: LineJobs, json: bool
) -> None:
    """Submits a job for each line, many in a transaction, and prints their ids. Lines that are wrong are left out.

    Raises:
        ConfigError: the file cannot be read, or its lines are requests of OpenAI's batches.
        Exit: a line is wrong.
    """
    ids: list[str] = []
    errors: list[dict[str, Any]] = []
    if jobs.key is not None and not jobs.key.strip():
        raise ConfigError("the key is empty: leave it out, or give one")
    with open_source(path, form, settings.template is not None) as source:
        if source.form == "openai":
            raise ConfigError(
                f"the lines of {source.name} are requests of OpenAI's batches: `lambda-split batch` answers them"
            )
        try:
            for lines in slices(parsed(source, settings, True, lambda text: stderr.print(f"note: {text}"))):
                added = store.submit_ids(jobs.entries(lines), jobs.group)
                ids += added
                errors += [line.entry.error for line in lines if line.entry.error is not None]
                if not json and added:
                    print("\n".join(added), flush=True)
        except SplitError:
            if ids:
                stderr.print(f"{_jobs(len(ids))} submitted before this:")
            raise
    # Not before the last line: the agent may have done all others by then.
    if ids:
        store.hooks.add(jobs.actions, ids, jobs.group)
    if json:
        emit_json({"jobs": len(ids), "group": jobs.group, "ids": ids, "errors": errors})
    where = "" if jobs.group is None else f" in group {jobs.group}"
    stderr.print(f"{_jobs(len(ids))} submitted{where}", soft_wrap=True)
    if errors:
        left_out = "1 line was" if len(errors) == 1 else f"{len(errors)} lines were"
        stderr.print(f"error: {left_out} left out; {errors[0]['message']}", soft_wrap=True)
        raise typer.Exit(1)


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"

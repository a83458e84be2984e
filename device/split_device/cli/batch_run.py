"""Answers a batch in the foreground, and says what became of it."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from split_common.errors import ConfigError
from split_common.system.console import emit_json, stderr
from split_common.system.outputs import check_absent, is_stream, output_name
from split_common.system.process import allow_many_files
from split_common.system.signals import delay_signals
from split_device.batches.finish import finish
from split_device.batches.parsing import parsed
from split_device.batches.pictures import Pictures, clashes
from split_device.batches.place import FinishedBatch, OutputForm, Place, Record, has_written, now, stamp
from split_device.batches.plan import Plan
from split_device.batches.results import Summary
from split_device.batches.settings import BatchSettings
from split_device.batches.source import Source
from split_device.batches.work import counts, prepare
from split_device.cli.batch_progress import ProgressMode, batch_progress
from split_device.cli.terminal import loading, print_notice, with_notices
from split_device.generation.limits import Limits
from split_device.jobs.store import Store
from split_device.models.hardware import Hardware
from split_device.sessions.connection import Connection


@dataclass(frozen=True)
class Begun:
    """A batch whose lines are jobs of these models. `resumed` of its answers are there from an earlier run."""

    place: Place
    record: Record
    plan: Plan
    store: Store
    models: list[str]
    resumed: int


@dataclass(frozen=True)
class Answered:
    """What a run came to. `tokens` is how many it generated."""

    summary: Summary
    tokens: int


@dataclass(frozen=True)
class Work:
    """What a command asks for.

    Args:
        detach: whether the agent is to answer it.
    """

    place: Place
    source: Path
    output: Path
    output_form: OutputForm
    output_dir: Path | None
    detach: bool

    def check_new(self, overwrite: bool) -> Record | None:
        """The record of an earlier run that this one continues. Forgets one whose answers are to be replaced.

        Raises:
            ConfigError: the file of answers exists, and was not written by a run with errors.
        """
        if self.detach and is_stream(self.output):
            raise ConfigError(f"{self.output} is not a file, which --detach needs")
        before = self.place.record()
        done = before is not None and before.finished is not None and not before.errors
        own = before is not None and has_written(before, self.output)
        if not overwrite and (done or not own):
            check_absent(self.output)
        if before is not None and before.finished is not None and (overwrite or done):
            self.place.remove()
            return None
        return before

    @contextlib.contextmanager
    def begun(
        self,
        source: Source,
        settings: BatchSettings,
        store_key: Path | None,
        overwrite: bool,
        before: Record | None,
    ) -> Iterator[Begun]:
        """Makes jobs of the lines, and says so; what is left of a batch that cannot begin is removed."""
        old = self.place.store.exists()
        ready = False
        try:
            with Store(self.place.store, store_key) as store:
                store.recover()
                prepared = prepare(parsed(source, settings, self.output_dir is not None, note), self.place, store)
                if self.output_dir is not None and before is None and not overwrite:
                    self._check_pictures(self.output_dir, prepared.plan)
                record = Record(
                    source=source.name,
                    output=str(self.output if is_stream(self.output) else self.output.resolve()),
                    output_dir=str(self.output_dir.resolve()) if self.output_dir is not None else None,
                    input_form=source.form,
                    output_form=self.output_form,
                    lines=prepared.lines,
                    jobs=prepared.jobs,
                    created=now() if before is None else before.created,
                    detached=self.detach,
                    written=stamp(self.output),
                )
                self.place.write(record)
                ready = True
                models = settings.models.names()
                begun = Begun(self.place, record, prepared.plan, store, models, counts(store)[0])
                _say_begun(begun)
                if prepared.dropped:
                    note(_unused(prepared.dropped))
                yield begun
        finally:
            if not ready and not old:
                self.place.remove()

    def _check_pictures(self, directory: Path, plan: Plan) -> None:
        if (path := clashes(directory, plan)) is not None:
            raise ConfigError(f"{path} exists already: remove it, or give --overwrite")


def _unused(answers: int) -> str:
    if answers == 1:
        return "1 answer of an earlier run is not used, because its line or the settings have changed"
    return f"{answers} answers of an earlier run are not used, because their lines or the settings have changed"


def note(text: str) -> None:
    stderr.print(f"note: {text}", soft_wrap=True)


def _say_begun(begun: Begun) -> None:
    record, name = begun.record, begun.place.name
    lines = "1 line" if record.lines == 1 else f"{record.lines} lines"
    stderr.print(f"{name}: {lines} of {record.source} to {output_name(Path(record.output))}", soft_wrap=True)
    if begun.resumed:
        stderr.print(f"resuming: {begun.resumed} of {record.jobs} are already answered", soft_wrap=True)


@dataclass(frozen=True)
class Running:
    """How a command runs the jobs of a batch.

    Args:
        give_up: seconds after which a job that cannot run fails.
        interrupted: set by SIGTERM.
    """

    connection: Connection
    hardware: Hardware
    limits: Limits
    give_up: float
    progress: ProgressMode
    interrupted: threading.Event


def run(begun: Begun, how: Running) -> Answered:
    """Answers a batch, and writes its files.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when it has said what is kept.
        ConfigError: a file cannot be written.
    """
    store, jobs = begun.store, begun.record.jobs
    tokens = store.generated()
    try:
        if begun.resumed < jobs:
            _run_jobs(begun, how)
    except KeyboardInterrupt:
        stderr.print(
            f"interrupted: {store.count()['succeeded']} of {jobs} answers are kept, and the same command goes on; "
            f"`lambda-split jobs result {begun.place.name}` prints them",
            soft_wrap=True,
        )
        raise
    # A signal that comes now does not part the files from the record of them.
    with delay_signals():
        summary = finish(begun.place, begun.record, begun.plan, store)
        return Answered(summary, store.generated() - tokens)


def _run_jobs(begun: Begun, how: Running) -> None:
    """Runs the jobs to their end. Raises KeyboardInterrupt after SIGTERM."""
    record, store = begun.record, begun.store
    with loading(how.connection, *begun.models):
        from split_device.jobs.models import Models
        from split_device.jobs.runner import JobRunner

    directory = record.output_dir
    pictures = None if directory is None else Pictures(Path(directory), begun.plan, store)
    with batch_progress(how.progress, begun.place.name, record.jobs, store.generated) as advance:
        allow_many_files()
        with Models(with_notices(how.connection), how.limits, how.hardware) as models:
            runner = JobRunner(store, models, how.give_up, print_notice)
            try:
                while (found := counts(store))[0] < record.jobs:
                    if how.interrupted.is_set():
                        raise KeyboardInterrupt
                    advance(*found)
                    runner.turn()
                    if pictures is not None:
                        pictures.write()
            finally:
                runner.stop()
        advance(*found)


def report(begun: Begun, answered: Answered, seconds: float, json: bool) -> None:
    """Says what became of a batch; exit code 1 if any line has an error."""
    summary, output = answered.summary, begun.record.output
    good = summary.lines - summary.errors
    stderr.print(f"{output_name(Path(output))}: {good} answered{failures(summary.reasons)}", soft_wrap=True)
    if summary.first_error is not None:
        stderr.print(f"the first: {summary.first_error}", soft_wrap=True)
        stderr.print("to retry what failed, run the same command again", soft_wrap=True)
    if json:
        emit_json(_facts(begun.place, output, summary, begun.resumed, answered.tokens, seconds))
    if summary.errors:
        raise typer.Exit(1)


def _facts(
    place: Place, output: str, summary: Summary, resumed: int, tokens: int, seconds: float
) -> dict[str, Any]:
    """What `--json` says of a batch."""
    return {
        "name": place.name,
        "output": output,
        "lines": summary.lines,
        "errors": summary.errors,
        "reasons": dict(summary.reasons.most_common()),
        "first_error": summary.first_error,
        "resumed": resumed,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
    }


def report_done(place: Place, output: Path, done: FinishedBatch, json: bool) -> None:
    """Says that there is nothing to do, because the same command has written all answers before."""
    lines = "1 line" if done.lines == 1 else f"{done.lines} lines"
    stderr.print(f"{output} has the answers to all {lines} already: nothing to do", soft_wrap=True)
    if json:
        emit_json(_facts(place, str(output.resolve()), Summary(lines=done.lines), done.jobs, 0, 0.0))


def failures(reasons: Counter[str]) -> str:
    """Why lines have no answers, for people: `, 3 failed (2 prompt too long, 1 no worker), 5 cancelled`."""
    failed = Counter[str]()
    for code, count in reasons.items():
        if code != "cancelled":
            failed[_words(code)] += count
    words = ", ".join(f"{count} {reason}" for reason, count in failed.most_common())
    found = f", {failed.total()} failed ({words})" if failed else ""
    return found + (f", {cancelled} cancelled" if (cancelled := reasons["cancelled"]) else "")


def _words(code: str) -> str:
    """The code of an error in words: `PromptTooLong` and `prompt_too_long` are both `prompt too long`."""
    return re.sub("(?<=[a-z])(?=[A-Z])", " ", code).replace("_", " ").lower()

"""`lambda-split batch`: a file of requests to a file of answers."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from split_common.cli.groups import grouped
from split_common.cli.options import JsonOption
from split_common.errors import ConfigError, JobsError
from split_common.system.console import emit_json, stderr
from split_common.system.lock import Held, holding
from split_common.system.outputs import check_output, is_stream
from split_common.system.process import passive_threads
from split_common.system.signals import catch_sigterm
from split_device.cli.groups import LIMITS, ConnectionOptions, TextModelOptions
from split_device.cli.options import GIVE_UP, GiveUpOption, StoreKeyOption
from split_device.cli.terminal import loading
from split_device.generation.limits import Limits
from split_device.jobs.store import Store
from split_device.openai import batch_file as batches
from split_device.openai.batch_requests import open_requests
from split_device.sessions.connection import Connection

if TYPE_CHECKING:
    from split_device.jobs.runner import JobRunner


#: Interval between two counts of the tokens, for which the whole store is read, in seconds.
COUNT_INTERVAL = 5.0


@grouped
def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests in the format of OpenAI's batches.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT.jsonl", help="Where to write the answers.")
    ],
    model: TextModelOptions,
    connection: ConnectionOptions,
    limits: Annotated[Limits, LIMITS.without("images")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of answers if it exists.")
    ] = False,
    give_up: GiveUpOption = GIVE_UP,
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Answer a file of requests, many at once; after Ctrl-C or a crash, the same command resumes.

    Each line is a request: `custom_id`, `method` (POST), `url` (/v1/chat/completions or /v1/completions) and
    `body`. When all are done, OUT.jsonl is written with one line for each, in the same order: a `response` or an
    `error`. All lines are answered by --model, whatever model they name. Exit code 1 if any line has an `error`.
    """
    passive_threads()
    check_output(output, source)
    if output.exists() and not overwrite and not is_stream(output):
        raise ConfigError(f"{output} exists already: remove it, or give --overwrite")
    began = time.perf_counter()
    stop = catch_sigterm()
    work = batches.work_path(output, source)
    choice = model.choice()
    try:
        with open_requests(source, choice) as requests, holding(work.with_suffix(".lock")):
            with Store(work, store_key) as store:
                store.recover()
                before = store.generated()
                with batches.BatchJobs(requests, store) as jobs:
                    if jobs.jobs:
                        _run(choice.name, store, jobs, connection, limits, give_up, stop)
                    tokens = store.generated() - before
                    count, errors = batches.write(output, jobs.records())
            batches.remove(work)
    except Held as held:
        raise JobsError(f"process {held.pid} is already working on {output}") from None
    seconds = time.perf_counter() - began
    stderr.print(f"{output}: {count} answered, {errors} of them with an error", soft_wrap=True)
    if json:
        emit_json(
            {
                "output": str(output),
                "lines": count,
                "errors": errors,
                "tokens": tokens,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
            }
        )
    if errors:
        raise typer.Exit(1)


def _run(
    name: str,
    store: Store,
    jobs: batches.BatchJobs,
    connection: Connection,
    limits: Limits,
    give_up: float,
    stop: threading.Event,
) -> None:
    """Runs a batch's jobs to their end, by the model of this name. Raises KeyboardInterrupt after SIGTERM."""
    with loading(connection, name):
        from split_device.jobs.models import Models
        from split_device.jobs.runner import JobRunner

    with Models(connection, limits) as models:
        _run_with_progress(JobRunner(store, models, give_up, stderr.print), store, jobs, stop)


def _run_with_progress(runner: JobRunner, store: Store, jobs: batches.BatchJobs, stop: threading.Event) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f} tokens/s"),
        TimeRemainingColumn(),
    )
    began, before = time.perf_counter(), store.generated()
    counted = began
    with Progress(*columns, console=stderr) as progress:
        task = progress.add_task("answering", total=jobs.jobs, rate=0.0)
        try:
            while (ended := jobs.ended) < jobs.jobs:
                if stop.is_set():
                    raise KeyboardInterrupt
                runner.turn()
                progress.update(task, completed=ended)
                if (now := time.perf_counter()) - counted > COUNT_INTERVAL:
                    progress.update(task, rate=(store.generated() - before) / (now - began))
                    counted = time.perf_counter()
            progress.update(task, completed=jobs.jobs)
        finally:
            runner.stop()

"""`lambda-split jobs …`: the jobs that were submitted."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from split_common.cli.options import JsonOption
from split_common.errors import ConfigError
from split_common.models.checkpoint_files import model_name
from split_common.system.console import emit_json, print_text, stderr, stdout
from split_device.cli.job_output import job_facts, report_image, show_output
from split_device.cli.options import GroupOption, MetadataOption, StoreKeyOption, parse_age
from split_device.images.settings import check_image_output
from split_device.jobs.follow import image_output, text_output
from split_device.jobs.job import STATES, ImageTask, Job, Selection, State
from split_device.jobs.store import Store, store_path

app = typer.Typer(no_args_is_help=True, help="Manage the jobs that were submitted.", rich_markup_mode="markdown")

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The id that `submit` printed.")]


@app.command("list")
def list_jobs(
    state: Annotated[
        list[str] | None,
        typer.Option(
            "--state",
            metavar="STATE",
            help="List only jobs in this state: queued, running, succeeded, failed or cancelled. May be repeated.",
        ),
    ] = None,
    group: GroupOption = None,
    limit: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of jobs to list, the newest first.")
    ] = 50,
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """List jobs, the newest first."""
    with Store(store_path(), store_key) as store:
        jobs = store.jobs(Selection(states=_states(state), group=group), limit)
    if json:
        emit_json({"jobs": [job_facts(job) for job in jobs]})
        return
    # In 80 columns only the model's name may have to be shortened.
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for column in ("job", "state", "priority", "submitted", "model", "made"):
        table.add_column(column, no_wrap=column != "model")
    for job in jobs:
        model = model_name(job.task.model.name).rpartition("/")[2]
        table.add_row(job.id, job.state, str(job.priority), _clock(job.created)[:-3], model, _made(job))
    stdout().print(table)


@app.command()
def show(job: JobArgument, store_key: StoreKeyOption = None, json: JsonOption = False) -> None:
    """Show everything about a job except its prompt and its answer."""
    with Store(store_path(), store_key) as store:
        facts = job_facts(store.get(job))
    if json:
        emit_json(facts)
        return
    for name, value in facts.items():
        if value is not None:
            print_text(f"{name}: {_clock(value) if name in ('created', 'started', 'finished') else value}")


@app.command()
def watch(job: JobArgument, store_key: StoreKeyOption = None, json: JsonOption = False) -> None:
    """Stream a job's answer from its beginning until the job ends; for an image, show its progress."""
    with Store(store_path(), store_key) as store:
        show_output(store, store.get(job), None, json)


@app.command()
def result(
    job: JobArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write an image: a .png, .jpg or .webp file."),
    ] = None,
    metadata: MetadataOption = True,
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Print the answer of a job that has succeeded, or write its image. Exit code 1 if it has not."""
    with Store(store_path(), store_key) as store:
        found = store.get(job)
        if found.kind == "image":
            if output is None:
                raise ConfigError(f"job {job} makes an image: give -o FILE")
            check_image_output(output)
            report_image(found, image_output(store, found), output, json, metadata)
            return
        text = text_output(store, found)
    if output is not None:
        raise ConfigError(f"job {job} makes a text, which is printed: -o is for images")
    if json:
        emit_json(job_facts(found) | {"text": text})
    else:
        print_text(text)


@app.command()
def cancel(job: JobArgument, store_key: StoreKeyOption = None, json: JsonOption = False) -> None:
    """Cancel a job; the agent cancels a running one within a second."""
    _change(job, store_key, json, Store.cancel)


@app.command()
def retry(job: JobArgument, store_key: StoreKeyOption = None, json: JsonOption = False) -> None:
    """Queue a failed or cancelled job again: a text continues where it stopped, an image starts over."""
    _change(job, store_key, json, Store.retry)


@app.command()
def prune(
    older_than: Annotated[
        str,
        typer.Option(
            metavar="AGE", help="Remove jobs that ended longer ago than this, e.g. 90s, 30m, 12h or 7d; 0s for all."
        ),
    ] = "7d",
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Remove jobs that have ended, with their prompts and answers."""
    age = parse_age(older_than)
    with Store(store_path(), store_key) as store:
        removed = store.prune(time.time() - age)
    if json:
        emit_json({"removed": removed})
    else:
        stderr.print(f"removed {removed} jobs")


def _change(id_: str, store_key: Path | None, json: bool, change: Callable[[Store, str], Job]) -> None:
    with Store(store_path(), store_key) as store:
        job = change(store, id_)
    if json:
        emit_json(job_facts(job))
    else:
        stderr.print(f"{job.id} {'will be cancelled soon' if job.cancelling else f'is {job.state}'}")


def _made(job: Job) -> str:
    """A job's progress, for the table."""
    if isinstance(job.task, ImageTask):
        return f"{job.steps} of {job.task.settings.steps} steps"
    return f"{job.tokens} tokens"


def _states(names: list[str] | None) -> tuple[State, ...]:
    known: dict[str, State] = {state: state for state in STATES}
    try:
        return tuple(known[name] for name in names or ())
    except KeyError as error:
        raise ConfigError(f"invalid state {error}: expected one of {', '.join(known)}") from None


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))

"""`lambda-split jobs …`: the jobs that were submitted."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from split_common.cli.groups import grouped
from split_common.cli.options import JsonOption
from split_common.errors import ConfigError
from split_common.system.console import emit_json, print_text, stderr, stdout
from split_common.system.outputs import check_absent, check_output, output_name
from split_device.batches.finish import prune as prune_batches
from split_device.batches.place import is_batch
from split_device.cli.batch_options import FormatOption, OverwriteOption, ProgressOption
from split_device.cli.batches import (
    all_batches,
    batch_result,
    cancel_batches,
    print_batches,
    show_batch,
    watch_batch,
)
from split_device.cli.image_options import MetadataOption
from split_device.cli.job_export import export_form, records, write_records
from split_device.cli.job_output import image_directory, interruptible, report_image, show_output
from split_device.cli.job_results import show_results
from split_device.cli.job_selection import CHOICE, Choice, ChoiceOptions, JobArgument
from split_device.cli.job_table import asked, job_lines, job_table
from split_device.cli.job_watch import watch_jobs
from split_device.cli.options import StoreKeyOption, parse_age
from split_device.images.settings import check_image_output
from split_device.jobs.agent import running_agent
from split_device.jobs.follow import image_output, text_output
from split_device.jobs.job import PAST, Selection
from split_device.jobs.shown import job_facts, may_pass, reason, shown_counts, shown_state, title
from split_device.jobs.store import Changed, Store, store_path

app = typer.Typer(no_args_is_help=True, help="Manage the jobs that were submitted.", rich_markup_mode="markdown")

OutputDirOption = Annotated[
    Path | None,
    typer.Option(
        "--output-dir", metavar="DIR", help="Where to write images, as JOB.png. Created if it does not exist."
    ),
]


@app.command("list")
@grouped
def list_jobs(
    choice: Annotated[Choice, CHOICE.without("jobs")],
    limit: Annotated[
        int, typer.Option(min=1, max=100_000, metavar="N", help="Maximum number of jobs to list, the newest first.")
    ] = 50,
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """List jobs, the newest first, with the first words of their prompts.

    Without options that choose jobs, batches are listed as well.
    """
    batches = all_batches(store_key) if choice.is_empty else []
    with Store(store_path(), store_key) as store:
        selection = choice.selection(store)
        jobs = store.jobs(selection, limit)
        counts = shown_counts(store.count(selection))
    total = sum(counts.values())
    if json:
        listed = [job_facts(job) | {"title": title(job.task)} for job in jobs]
        emit_json({"jobs": listed, "total": total, "counts": counts, "batches": batches})
        return
    print_batches(batches)
    for line in job_table(jobs, stdout().width) if jobs else ():
        print_text(line)
    words = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    more = f"{len(jobs)} of {total}" if len(jobs) < total else str(total)
    stderr.print(f"{more} job{'' if total == 1 else 's'}{f': {words}' if words else ''}", soft_wrap=True)
    if len(jobs) < total:
        stderr.print("--limit lists more; --state, --group and --since choose some", soft_wrap=True)


@app.command()
def show(job: JobArgument, store_key: StoreKeyOption = None, json: JsonOption = False) -> None:
    """Show all about a job except its answer: its state, what was asked, and with which settings."""
    if is_batch(job):
        show_batch(job, store_key, json)
        return
    with Store(store_path(), store_key) as store:
        found = store.get(job)
        actions = store.hooks.of_job(job)
    if json:
        emit_json(job_facts(found) | {"asked": asked(found), "on_done": msgspec.to_builtins(actions)})
        return
    for line in job_lines(found, actions):
        print_text(line)


@app.command()
@grouped
def watch(
    choice: ChoiceOptions,
    progress: ProgressOption = "auto",
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Stream a job's answer from its beginning until the job ends; for an image, show its progress.

    For a batch, or several jobs, named or chosen by --group, --state and --since, it shows how many have ended,
    until all have. Exit code 1 if one has not succeeded.
    """
    if names := choice.batches:
        if len(names) > 1:
            raise ConfigError("name one batch")
        watch_batch(names[0], progress, store_key, json)
        return
    with Store(store_path(), store_key) as store:
        ids = choice.ids(store)
        if not choice.jobs or len(ids) > 1:
            # Of a group, also jobs that join it later; states, though, change while it watches.
            changing = choice.state or choice.since is not None
            selection = Selection(ids=tuple(ids)) if changing else choice.selection(store)
            watch_jobs(store, selection, progress, json)
            return
        found = store.get(ids[0])
        with interruptible(found):
            show_output(store, found, None, json)


@app.command()
@grouped
def result(
    choice: ChoiceOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where to write an image: a .png, .jpg or .webp file; `-` is stdout.",
        ),
    ] = None,
    output_dir: OutputDirOption = None,
    metadata: MetadataOption = True,
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Print the answers of jobs that have succeeded, or write their images. Exit code 1 if one has not.

    Several answers are printed one after the other, each under a line with its job's id. `jobs export` writes them
    into one file. For a batch, print the answers so far, or write them to FILE.
    """
    if names := choice.batches:
        if len(names) > 1 or output_dir is not None:
            raise ConfigError("name one batch; its images are in the directory that `batch` was given")
        batch_result(names[0], output, store_key, json)
        return
    with Store(store_path(), store_key) as store:
        ids = choice.ids(store)
        if not choice.jobs or len(ids) > 1:
            if output is not None:
                raise ConfigError("-o is for one image: --output-dir DIR writes several")
            if not show_results(store, ids, output_dir, metadata, json):
                raise typer.Exit(1)
            return
        found = store.get(ids[0])
        if found.kind == "image":
            path = _image_path(found.id, output, output_dir)
            report_image(found, image_output(store, found), path, json, metadata)
            return
        text = text_output(store, found)
    if output is not None or output_dir is not None:
        raise ConfigError(f"{found.id} makes a text, which is printed: -o and --output-dir are for images")
    if json:
        emit_json(job_facts(found) | {"text": text})
    else:
        print_text(text)


def _image_path(id_: str, output: Path | None, directory: Path | None) -> Path:
    """Where the image of a job is written. Raises ConfigError if that is not said, or not possible."""
    if (output is None) == (directory is None):
        raise ConfigError(f"{id_} makes an image: give -o FILE or --output-dir DIR")
    if output is None and directory is not None:
        output = image_directory(directory) / f"{id_}.png"
    assert output is not None
    check_image_output(output)
    return output


@app.command()
@grouped
def export(
    choice: ChoiceOptions,
    form: FormatOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            show_default="stdout",
            help="Where to write prompts and answers.",
        ),
    ] = None,
    output_dir: OutputDirOption = None,
    overwrite: OverwriteOption = False,
    metadata: MetadataOption = True,
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Write prompts and answers of many jobs, the oldest first, into one file.

    Jobs that have succeeded are exported, or those in the states that --state names.
    """
    if json and output is None:
        raise ConfigError("--json needs -o FILE: without it the jobs themselves are printed")
    if output is not None:
        check_output(output)
        if not overwrite:
            check_absent(output)
    with Store(store_path(), store_key) as store:
        ids = store.ids(choice.selection(store, default=("succeeded",)))
        counts = shown_counts(store.count(dataclasses.replace(choice, state=None).selection(store)))
        found = records(store, ids, output_dir, metadata)
        write_records(found, export_form(form, output), output)
    left_out = {
        name: count for name, count in counts.items() if count and name not in (choice.state or ["succeeded"])
    }
    if json:
        emit_json({"output": str(output), "jobs": len(ids), "left_out": left_out})
        return
    words = ", ".join(f"{count} {name}" for name, count in left_out.items())
    rest = f"; left out: {words} (--state exports them)" if words else ""
    place = f" to {output_name(output)}" if output is not None else ""
    stderr.print(f"{len(ids)} job{'' if len(ids) == 1 else 's'} exported{place}{rest}", soft_wrap=True)


@app.command()
@grouped
def cancel(
    choice: ChoiceOptions,
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Cancel jobs; the agent cancels running ones within a second.

    --group, --state and --since choose among those that have not ended. The file of a
    cancelled batch gets the answers so far.
    """
    if names := choice.batches:
        cancel_batches(names, store_key, json)
        return
    with Store(store_path(), store_key) as store:
        ids = choice.ids(store, among=("queued", "running"))
        changed = store.cancel_all(ids, lambda: running_agent() is None)
    _report(changed, choice.jobs, json)


@app.command()
@grouped
def retry(
    choice: ChoiceOptions,
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Queue failed or cancelled jobs again: a text continues where it stopped, an image starts over.

    --group, --state and --since choose among those that failed or were cancelled.
    """
    if choice.batches:
        raise ConfigError("to retry what failed in a batch, run its `batch` command again")
    with Store(store_path(), store_key) as store:
        ids = choice.ids(store, among=("failed", "cancelled"))
        failed = store.jobs(Selection(ids=tuple(ids), states=("failed",)))
        changed = store.retry_all(ids)
    _report(changed, choice.jobs, json)
    if lasting := [job for job in failed if not may_pass(job)]:
        first = lasting[-1]
        stderr.print(
            f"note: {len(lasting)} of these will probably fail again; {first.id}: {reason(first)}",
            soft_wrap=True,
            markup=False,
        )


@app.command()
def prune(
    older_than: Annotated[
        str,
        typer.Option(
            metavar="AGE",
            help="Remove jobs and batches that ended longer ago than this, e.g. 90s, 30m, 12h or 7d; 0s for all.",
        ),
    ] = "7d",
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Remove jobs and batches that have ended, with their prompts and answers."""
    before = time.time() - parse_age(older_than)
    with Store(store_path(), store_key) as store:
        removed = store.prune(before)
    batches = prune_batches(before)
    if json:
        emit_json({"removed": removed, "batches": batches})
    else:
        more = f" and {batches} batch{'' if batches == 1 else 'es'}" if batches else ""
        stderr.print(f"removed {removed} job{'' if removed == 1 else 's'}{more}")


def _report(changed: Changed, named: list[str] | None, json: bool) -> None:
    """Says which jobs were changed, and raises for those that could not be.

    Raises:
        JobsError: the only job that is named could not be changed.
        Exit: one of several could not.
    """
    if named and len(named) == 1:
        changed.check()
        job = changed.jobs[0]
        if json:
            emit_json(job_facts(job))
        else:
            stderr.print(f"{job.id} {'will be cancelled soon' if job.ending else PAST[shown_state(job)]}")
        return
    errors: list[dict[str, Any]] = [{"id": id_, "message": str(why)} for id_, why in changed.refused.items()]
    if json:
        emit_json({"jobs": [job_facts(job) for job in changed.jobs], "errors": errors})
    else:
        for error in errors:
            stderr.print(f"error: {error['message']}", soft_wrap=True)
        soon = sum(job.ending for job in changed.jobs)
        states = {shown_state(job) for job in changed.jobs if not job.ending}
        words = [f"{len(changed.jobs) - soon} {state}" for state in states]
        words += [f"{soon} will be cancelled soon"] if soon else []
        stderr.print(", ".join(words) or "no job was changed", soft_wrap=True)
    if errors:
        raise typer.Exit(1)

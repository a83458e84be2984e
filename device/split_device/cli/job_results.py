"""The answers and images of several jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from split_common.errors import JobsError, UnknownJob
from split_common.system.console import emit_json, print_text, stderr
from split_device.cli.job_output import image_directory, image_file, save_image
from split_device.jobs.follow import image_output, text_output
from split_device.jobs.job import Job
from split_device.jobs.shown import job_facts
from split_device.jobs.store import Store


def show_results(store: Store, ids: list[str], directory: Path | None, metadata: bool, json: bool) -> bool:
    """Prints answers, each under its job's id, and writes images; returns whether all jobs have succeeded.

    Args:
        directory: where images are written, as JOB.png; None for nowhere.

    Raises:
        ConfigError: a job has an image, and there is no directory, or it cannot be written.
    """
    if directory is not None:
        image_directory(directory)
    found: list[dict[str, Any]] = []
    errors: list[dict[str, str]] = []
    for id_ in ids:
        try:
            job = store.get(id_)
            output = _output(store, job, directory, metadata)
        except (JobsError, UnknownJob) as error:
            errors.append({"id": id_, "message": str(error)})
            if not json:
                stderr.print(f"error: {error}", soft_wrap=True)
            continue
        found.append(job_facts(job) | output)
        if not json:
            print_text(f"==> {id_} <==\n{output.get('text', output.get('output'))}")
    if json:
        emit_json({"jobs": found, "errors": errors})
    return not errors


def _output(store: Store, job: Job, directory: Path | None, metadata: bool) -> dict[str, str]:
    """A job's text, or the path of its image. Raises JobsError if the job has not succeeded."""
    if job.kind == "text":
        return {"text": text_output(store, job)}
    png = image_output(store, job)
    path = image_file(directory, job)
    save_image(png, path, metadata)
    return {"output": str(path)}

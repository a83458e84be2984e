"""Output of jobs for commands: their facts, the answer as it streams, the image."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from split_common.system.console import emit_json, print_text, stderr
from split_common.system.files import write_private
from split_device.cli.terminal import step_progress
from split_device.images.settings import image_bytes, image_format
from split_device.jobs.follow import follow, image_output, text_output
from split_device.jobs.job import ImageTask, Job
from split_device.jobs.store import Store


def show_output(store: Store, job: Job, output: Path | None, json: bool) -> None:
    """Follows a job to its end. Raises JobsError if it does not succeed."""
    if isinstance(job.task, ImageTask):
        _show_image(store, job, job.task.settings.steps, output, json)
    else:
        _show_answer(store, job, json)


def _show_answer(store: Store, job: Job, json: bool) -> None:
    def print_now(text: str) -> None:
        if not json:
            print_text(text, end="")

    job = follow(store, job.id, print_now)
    if not json:
        print(flush=True)
    text = text_output(store, job)
    if json:
        emit_json(job_facts(job) | {"text": text})


def _show_image(store: Store, job: Job, steps: int, output: Path | None, json: bool) -> None:
    with step_progress(steps, json) as advance:
        job = follow(store, job.id, on_step=lambda done: advance(done, max(done, steps)))
    image = image_output(store, job)
    if output is not None:
        write_image(image, output)
    if json:
        emit_json(job_facts(job) | {"output": str(output) if output is not None else None})
    elif output is not None:
        stderr.print(f"wrote {output}", soft_wrap=True)
    else:
        stderr.print(f"the image is made: `lambda-split jobs result {job.id} -o FILE` writes it", soft_wrap=True)


def write_image(png: bytes, path: Path) -> None:
    """Writes an image in the format of the path's extension."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        write_private(path.absolute(), image_bytes(image, image_format(path.name)))


def job_facts(job: Job) -> dict[str, Any]:
    """A job's facts for users: everything except its prompt and its answer."""
    return {
        "id": job.id,
        "kind": job.kind,
        "state": job.state,
        "cancelling": job.cancelling,
        "priority": job.priority,
        "created": job.created,
        "started": job.started,
        "finished": job.finished,
        "model": job.task.model.name,
        "seed": job.task.seed,
        "prompt_tokens": job.prompt_tokens,
        "tokens": job.tokens,
        "steps": job.steps,
        "finish_reason": job.finish_reason,
        "error": job.error,
    }

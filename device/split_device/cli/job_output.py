"""Output of jobs for commands: their facts, the answer as it streams, the image."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from split_common.system.console import emit_json, print_text, stderr
from split_device.cli.terminal import step_progress
from split_device.images.files import notes, write_image
from split_device.jobs.follow import follow, image_output, text_output
from split_device.jobs.job import ImageTask, Job
from split_device.jobs.store import Store


def show_output(store: Store, job: Job, output: Path | None, json: bool, metadata: bool = True) -> None:
    """Follows a job to its end. Raises JobsError if it does not succeed.

    Args:
        output: where an image is written; None for nowhere.
        metadata: whether the image's file carries its settings.
    """
    if isinstance(job.task, ImageTask):
        _show_image(store, job, job.task.settings.steps, output, json, metadata)
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


def _show_image(store: Store, job: Job, steps: int, output: Path | None, json: bool, metadata: bool) -> None:
    with step_progress(steps, json) as advance:
        job = follow(store, job.id, on_step=lambda done: advance(done, max(done, steps)))
    image = image_output(store, job)
    if output is not None:
        report_image(job, image, output, json, metadata)
    elif json:
        emit_json(job_facts(job) | {"output": None})
    else:
        stderr.print(f"the image is made: `lambda-split jobs result {job.id} -o FILE` writes it", soft_wrap=True)


def report_image(job: Job, png: bytes, path: Path, json: bool, metadata: bool) -> None:
    """Writes a job's image in the format of the path's extension, and says so."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        write_image(image, path, metadata=metadata)
        if json:
            emit_json(job_facts(job) | {"output": str(path), "notes": notes(image)})
        else:
            stderr.print(f"wrote {path}", soft_wrap=True)
            print_notes(image)


def print_notes(image: Any) -> None:
    """Prints on stderr what was noticed while a Pillow image was made."""
    for found in notes(image):
        stderr.print(f"note: {found}", soft_wrap=True)


def job_facts(job: Job) -> dict[str, Any]:
    """A job's facts for users: everything except its prompt and its answer."""
    return {
        "id": job.id,
        "kind": job.kind,
        "state": job.state,
        "cancelling": job.cancelling,
        "priority": job.priority,
        "group": job.group,
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

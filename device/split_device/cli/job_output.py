"""Output of a job for commands: the answer as it streams, and the image."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from split_common.errors import ConfigError
from split_common.system.console import emit_json, stderr
from split_common.system.outputs import output_name
from split_device.cli.terminal import answer_line, print_notice, step_progress
from split_device.images.files import notes, write_image
from split_device.jobs.follow import follow, image_output, text_output
from split_device.jobs.job import ImageTask, Job
from split_device.jobs.shown import job_facts
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


@contextlib.contextmanager
def interruptible(job: Job) -> Iterator[None]:
    """Says after Ctrl-C that the job goes on, and how to follow it."""
    try:
        yield
    except KeyboardInterrupt:
        stderr.print(
            f"the job goes on: `lambda-split jobs watch {job.id}` follows it, `lambda-split jobs cancel {job.id}` "
            "ends it",
            soft_wrap=True,
        )
        raise


def _show_answer(store: Store, job: Job, json: bool) -> None:
    with answer_line(json) as print_now:
        job = follow(store, job.id, print_now, on_notice=print_notice)
    text = text_output(store, job)
    if json:
        emit_json(job_facts(job) | {"text": text})


def _show_image(store: Store, job: Job, steps: int, output: Path | None, json: bool, metadata: bool) -> None:
    with step_progress(steps, json) as advance:
        job = follow(store, job.id, None, lambda done: advance(done, max(done, steps)), print_notice)
    image = image_output(store, job)
    if output is not None:
        report_image(job, image, output, json, metadata)
    elif json:
        emit_json(job_facts(job) | {"output": None})
    else:
        stderr.print(f"the image is made: `lambda-split jobs result {job.id} -o FILE` writes it", soft_wrap=True)


def report_image(job: Job, png: bytes, path: Path, json: bool, metadata: bool) -> None:
    """Writes a job's image in the format of the path's extension, and says so."""
    found = save_image(png, path, metadata)
    if json:
        emit_json(job_facts(job) | {"output": str(path), "notes": found})
        return
    stderr.print(f"wrote {output_name(path)}", soft_wrap=True)
    for note in found:
        stderr.print(f"note: {note}", soft_wrap=True)


def save_image(png: bytes, path: Path, metadata: bool) -> list[str]:
    """Writes an image in the format of the path's extension; returns what was noticed while it was made.

    Args:
        metadata: whether the file carries the image's settings.

    Raises:
        ConfigError: it cannot be written.
    """
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        write_image(image, path, metadata=metadata)
        return notes(image)


def image_directory(path: Path) -> Path:
    """A directory for images, which is made if it is missing. Raises ConfigError if that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be made: {error.strerror}") from None
    return path


def image_file(directory: Path | None, job: Job) -> Path:
    """Where a job's image is written. Raises ConfigError if there is no directory for images."""
    if directory is None:
        raise ConfigError(f"{job.id} makes an image: give --output-dir DIR, where it is written")
    return directory / f"{job.id}.png"


def print_notes(image: Any) -> None:
    """Prints on stderr what was noticed while a Pillow image was made."""
    for found in notes(image):
        stderr.print(f"note: {found}", soft_wrap=True)

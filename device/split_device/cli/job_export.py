"""Prompts and answers of many jobs in one file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from split_common.system.console import print_text
from split_common.system.outputs import write_lines
from split_common.system.text import json_line
from split_common.system.times import iso_time
from split_device.batches.outputs import one_line, output_form
from split_device.batches.place import OutputForm
from split_device.cli.job_output import image_directory, image_file, save_image
from split_device.jobs.job import ImageTask, Job
from split_device.jobs.shown import prompt_of, shown_state
from split_device.jobs.store import Store


def export_form(form: OutputForm | None, output: Path | None) -> OutputForm:
    """The form that is asked for, or else that of the file's name."""
    return form or (output_form(output) if output is not None else "jsonl")


def records(store: Store, ids: list[str], directory: Path | None, metadata: bool) -> Iterator[dict[str, Any]]:
    """All about these jobs, one after the other. Images are written into a directory, as JOB.png.

    Raises:
        ConfigError: a job has an image, and there is no directory, or it cannot be written.
    """
    if directory is not None:
        image_directory(directory)
    for id_ in ids:
        yield _record(store, store.get(id_), directory, metadata)


def _record(store: Store, job: Job, directory: Path | None, metadata: bool) -> dict[str, Any]:
    answer = file = None
    if isinstance(job.task, ImageTask):
        if job.state == "succeeded":
            path = image_file(directory, job)
            save_image(store.image(job.id), path, metadata)
            file = str(path)
    else:
        answer = store.progress(job.id).text if job.state == "succeeded" or job.tokens else None
    return {
        "id": job.id,
        "group": job.group,
        "state": shown_state(job),
        "created_at": iso_time(job.created),
        "finished_at": iso_time(job.finished),
        "model": job.task.model.name,
        "seed": job.task.seed,
        "prompt": prompt_of(job.task),
        "answer": answer,
        "file": file,
        "finish_reason": job.finish_reason,
        "error": job.error,
    }


def write_records(found: Iterator[dict[str, Any]], form: OutputForm, output: Path | None) -> None:
    """Writes records to a file at once, or prints them. Raises ConfigError if the file cannot be written."""
    if output is None:
        for line in _formatted(found, form):
            print_text(line)
        return
    separator = "\t" if output.suffix.lower() == ".tsv" else ","
    write_lines(output, (f"{line}\n" for line in _formatted(found, form, separator)))


def _formatted(found: Iterator[dict[str, Any]], form: OutputForm, separator: str = ",") -> Iterator[str]:
    """Lines without their ends; a record of a table may have several.

    Args:
        separator: of a table's columns.
    """
    header = form == "csv"
    for record in found:
        if form == "jsonl":
            yield json_line(record)
        elif form == "txt":
            yield one_line(record["answer"] or record["file"] or "")
        else:
            if header:
                yield _row(list(record), separator)
                header = False
            yield _row([_cell(value) for value in record.values()], separator)


def _row(cells: list[str], separator: str) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\n").writerow(cells)
    return text.getvalue().removesuffix("\n")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

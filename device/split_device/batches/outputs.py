"""Files of a batch's answers: lines of JSON, a table, or texts, one per line."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from split_common.system.outputs import write_lines
from split_common.system.text import json_line
from split_device.batches.place import OutputForm
from split_device.batches.results import Result, Summary
from split_device.serving.choices import Choice
from split_device.serving.openai.answers import Header
from split_device.serving.openai.query import CompletionForm, CompletionKind
from split_device.serving.openai.usage import Usage
from split_device.serving.openai.whole import completion

#: Columns of a table of answers, behind those of the table of prompts.
_ANSWERS = ("answer", "finish_reason", "error")

_FORMS: dict[str, OutputForm] = {".csv": "csv", ".tsv": "csv", ".txt": "txt"}


def output_form(path: Path) -> OutputForm:
    """The form of a file of answers by its suffix."""
    return _FORMS.get(path.suffix.lower(), "jsonl")


def write_results(
    path: Path, form: OutputForm, found: Iterator[Result], ready: Callable[[IO[bytes]], object] | None = None
) -> Summary:
    """Writes a whole file of answers at once. Raises ConfigError if it cannot be written.

    Args:
        ready: gets the whole content before the file is touched.
    """
    summary = Summary()

    def counted() -> Iterator[Result]:
        for result in found:
            summary.add(result)
            yield result

    write_lines(path, formatted(form, counted(), tabs=path.suffix.lower() == ".tsv"), ready)
    return summary


def formatted(form: OutputForm, found: Iterator[Result], *, tabs: bool = False) -> Iterator[str]:
    """The lines of a file of answers, with their ends.

    Args:
        tabs: whether tabs separate a table's columns, and not commas.
    """
    if form == "csv":
        yield from _table(found, "\t" if tabs else ",")
    elif form == "txt":
        for result in found:
            for text in _answers(result) or [""]:
                yield f"{one_line(text)}\n"
    else:
        for result in found:
            yield f"{json_line(result_object(result))}\n"


def one_line(text: str) -> str:
    """A text on one line: line breaks and backslashes are escaped, so that every line of the file is an answer."""
    return text.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")


def _answers(result: Result) -> list[str]:
    """The texts of a result's choices, or the names of its pictures' files."""
    if result.error is not None:
        return []
    return list(result.entry.files) or [choice.text for choice in result.choices]


# --- tables ------------------------------------------------------------------------------------------------


def _table(found: Iterator[Result], separator: str) -> Iterator[str]:
    first = next(found, None)
    if first is None:
        return
    columns = list(first.entry.row) if first.entry.row is not None else ["id", "prompt"]
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator="\n")
    writer.writerow([*columns, *(_free(name, columns) for name in _ANSWERS)])
    for result in itertools.chain([first], found):
        row = result.entry.row
        given = list(row.values()) if row is not None else [result.entry.name or "", result.prompt or ""]
        given += [""] * (len(columns) - len(given))
        reasons = [choice.finish_reason or "" for choice in result.choices]
        error = "" if result.error is None else f"{result.error['code']}: {result.error['message']}"
        for answer, reason in itertools.zip_longest(_answers(result) or [""], reasons, fillvalue=""):
            writer.writerow([*given, answer, reason, error])
        yield text.getvalue()
        text.seek(0)
        text.truncate()


def _free(name: str, columns: list[str]) -> str:
    """The name of a new column: with a number if the table has one of this name."""
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    return next(each for each in names if each not in columns)


# --- lines of JSON -----------------------------------------------------------------------------------------


def result_object(result: Result) -> dict[str, Any]:
    return _short(result) if result.entry.kind in ("prompt", "picture") else _response(result)


def _short(result: Result) -> dict[str, Any]:
    """A prompt's answer, or the name of its picture's file."""
    entry, jobs = result.entry, result.jobs
    fields: dict[str, Any] = {"id": entry.name, "prompt": result.prompt}
    if entry.row is not None:
        fields["row"] = entry.row
    if entry.kind == "picture":
        picture = {"file": entry.files[0], "seed": jobs[0].task.seed} if result.error is None else None
        return fields | (picture or {"file": None, "seed": None}) | {"error": result.error}
    choice = result.choices[0] if result.choices else Choice("", 0, None)
    return fields | {
        "answer": choice.text if result.choices else None,
        "finish_reason": choice.finish_reason,
        "prompt_tokens": jobs[0].prompt_tokens if jobs else None,
        "tokens": choice.tokens,
        "seed": jobs[0].task.seed if jobs else None,
        "error": result.error,
    }


def _response(result: Result) -> dict[str, Any]:
    """An answer in the format of OpenAI's batches. Of pictures, it names the files."""
    entry, jobs = result.entry, result.jobs
    id_ = entry.digest[:24]
    record = {"id": f"batch_req_{id_}", "custom_id": entry.name}
    if result.error is not None:
        return record | {"response": None, "error": result.error}
    created = int(jobs[0].created)
    if entry.kind == "images":
        data = [{"file": file, "seed": job.task.seed} for file, job in zip(entry.files, jobs, strict=True)]
        body: dict[str, Any] = {"created": created, "model": entry.model, "data": data}
    else:
        kind: CompletionKind = "text" if entry.kind == "text" else "chat"
        body = _completion(Header(kind, id_, created, entry.model), result)
    # Of several choices, each is a job with a request id of its own.
    response = {"status_code": 200, "request_id": jobs[0].request_id, "body": body}
    return record | {"response": response, "error": None}


def _completion(header: Header, result: Result) -> dict[str, Any]:
    """The completion of a line's jobs: each is a choice of one of its prompts."""
    entry, jobs = result.entry, result.jobs
    form, count = entry.form, len(jobs)
    if isinstance(form, msgspec.UnsetType):
        form = CompletionForm(kind=header.kind, per_prompt=count, kept=count)
    prompts = sum(job.prompt_tokens or 0 for job in jobs[:: form.per_prompt])
    tokens = 0 if form.prompt_alone else sum(choice.tokens for choice in result.choices)
    return completion(header, form, Usage(prompts, tokens), result.choices, result.prompts)

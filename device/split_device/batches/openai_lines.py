"""Lines in the format of OpenAI's batches."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import PurePath
from typing import Any

import msgspec

from split_common.errors import ConfigError
from split_device.batches.lines import BadLine, Entry, Line, Names, bad_line, object_of
from split_device.batches.pictures import file_names
from split_device.batches.settings import BatchSettings
from split_device.batches.source import RawLine
from split_device.images.settings import check_size
from split_device.jobs.job import AnyTask, ImageTask, Task
from split_device.serving.fields import ApiError
from split_device.serving.media import with_local_files
from split_device.serving.openai.image_requests import IMAGE_PATH, parse_image
from split_device.serving.openai.query import CompletionKind
from split_device.serving.openai.requests import COMPLETION_PATHS, parse


def openai_line(raw: RawLine, settings: BatchSettings, names: Names) -> Line:
    """A line, parsed. A line that is wrong becomes one that has an error.

    Raises:
        ConfigError: the model that it needs cannot be found.
    """
    name: str | None = None
    try:
        fields = object_of(raw.text)
        given = fields.get("custom_id")
        if not isinstance(given, str) or not given:
            raise BadLine("custom_id is missing, or is not a string")
        name = given
        names.add("custom_id", name)
        if fields.get("method", "POST") != "POST":
            raise BadLine("method is not POST")
        entry, tasks = _parsed(fields, Entry(number=raw.number, name=name), settings)
    except ApiError as error:
        return bad_line(raw, name, error.code or error.type, error, "chat")
    except BadLine as error:
        return bad_line(raw, name, "invalid_request", error, "chat")
    model = tasks[0].model
    digest = hashlib.sha256(msgspec.json.encode((name, model, tasks))).hexdigest()
    return Line(msgspec.structs.replace(entry, digest=digest), tasks, len(raw.text or b""))


def _parsed(fields: dict[str, Any], entry: Entry, settings: BatchSettings) -> tuple[Entry, tuple[AnyTask, ...]]:
    """The entry and the tasks of a request. Raises BadLine or ApiError for one that a batch does not answer."""
    url, body = str(fields.get("url")), fields.get("body")
    if url == IMAGE_PATH:
        return _images(body, entry, settings)
    kind = COMPLETION_PATHS.get(url)
    if kind is None:
        raise BadLine(f"url is not one of {', '.join([*COMPLETION_PATHS, IMAGE_PATH])}")
    query = parse(kind, body, settings.models.text, template=settings.chat_template)
    if query.stream:
        raise BadLine("a line of a batch cannot be streamed")
    tasks = tuple(with_local_files(task, settings.media) for task in query.tasks)
    tasks = _with_given(tasks, kind, body, settings)
    return msgspec.structs.replace(entry, kind=kind, model=query.model, form=query.form), tasks


def _with_given(
    tasks: tuple[Task, ...], kind: CompletionKind, body: object, settings: BatchSettings
) -> tuple[Task, ...]:
    """The tasks with the settings that the user gave for requests that say nothing of them."""
    assert isinstance(body, dict)
    said = {name for name, value in body.items() if value is not None}
    if kind == "chat" and "max_completion_tokens" in said:
        said.add("max_tokens")
    if "stop" in settings.given - said:
        tasks = tuple(msgspec.structs.replace(task, stop=settings.stop) for task in tasks)
    defaults = {name: getattr(settings.sampling, name) for name in settings.given - said - {"stop"}}
    if not defaults:
        return tasks
    return tuple(
        msgspec.structs.replace(task, sampling=dataclasses.replace(task.sampling, **defaults)) for task in tasks
    )


def _images(body: object, entry: Entry, settings: BatchSettings) -> tuple[Entry, tuple[AnyTask, ...]]:
    request = parse_image(body)
    if request.stream:
        raise BadLine("a line of a batch cannot be streamed")
    model = settings.models.image
    try:
        chosen = request.settings(request.seed)
        check_size(model.name, chosen[0].checked())
    except ConfigError as error:
        raise BadLine(str(error)) from None
    tasks = tuple(ImageTask(model=model, prompt=request.prompt, settings=each) for each in chosen)
    entry = msgspec.structs.replace(
        entry,
        kind="images",
        model=request.model or PurePath(model.name).name,
        files=file_names(entry.name, entry.number, len(tasks), request.output_format),
        metadata=request.metadata,
    )
    return entry, tasks

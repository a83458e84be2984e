"""Lines that are prompts: plain texts, objects with a `prompt` or `messages`, and rows of a table."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import msgspec

from split_common.errors import ConfigError
from split_common.system.text import decode_text
from split_device.batches.lines import AnswerKind, BadLine, Entry, Line, Names, bad_line, object_of, whole
from split_device.batches.pictures import file_names
from split_device.batches.settings import BatchSettings
from split_device.batches.source import RawLine, Source
from split_device.batches.template import UnknownField
from split_device.generation.settings import Sampling, check_stop
from split_device.images.settings import ImageSettings, check_size, check_start, parse_pixels
from split_device.jobs.job import AnyTask, ImageTask, Message, Task
from split_device.serving.fields import ApiError, convert, present
from split_device.serving.media import with_local_files
from split_device.serving.openai.messages import parse_messages

#: Columns that hold a table's prompts if no other is named, the first that is there.
PROMPT_COLUMNS = ("prompt", "text")

#: What a plain text is called in a template.
TEXT_FIELDS = ("text", "prompt")

#: Names of a line's own id.
_IDS = ("id", "custom_id")


class _Object(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of an object that asks for a text. `BOUNDS` has the bounds of numbers."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    speculate: str | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    system: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class _Picture(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of an object that asks for an image."""

    steps: int | None = None
    size: str | None = None
    guidance: float | None = None
    negative: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None


class Prompts:
    """Parses the lines of a source into lines of a batch.

    Args:
        source: a source of prompts.

    Raises:
        ConfigError: the template or `--column` names a column that the table does not have, the prompts' column has
            to be named, or the model cannot be found.
    """

    def __init__(self, source: Source, settings: BatchSettings) -> None:
        self._settings = settings
        self._form = source.form
        self._names = Names()
        self._first = True
        #: Fields of objects that have no effect.
        self.unused: set[str] = set()
        self._kind: AnswerKind = "picture" if settings.images else "prompt"
        # Found once and for all lines, before any of them.
        if settings.images:
            directory = settings.models.image.name
            self._picture = settings.picture(directory)
            self._init_image = settings.start(self._picture, directory)
        else:
            _ = settings.models.text
        if source.form != "csv":
            if settings.column is not None:
                raise ConfigError("--column is for tables: files ending in .csv or .tsv, or --input-format csv")
        elif settings.template is None:
            self._column = _column(source, settings.column)
        elif settings.column is not None:
            raise ConfigError("--column and --template do not go together: the template names the columns")

    def line(self, raw: RawLine) -> Line:
        """A line, parsed. A line that is wrong becomes one that has an error.

        Raises:
            ConfigError: the first line lacks a field of the template.
        """
        first, self._first = self._first, False
        name: str | None = None
        try:
            fields = self._fields(raw)
            name = self._name(fields)
            tasks, used = self._tasks(fields)
        except UnknownField as error:
            if first:
                raise ConfigError(str(error)) from None
            return bad_line(raw, name or str(raw.number), "invalid_request", error, self._kind)
        except (ApiError, BadLine, ConfigError) as error:
            return bad_line(raw, name or str(raw.number), "invalid_request", error, self._kind)
        if self._form == "prompts":
            self.unused |= fields.keys() - used - set(_IDS)
        entry = Entry(
            number=raw.number,
            name=name or str(raw.number),
            kind=self._kind,
            row=raw.row,
            digest=self._names.digest(tasks) if name is None else _named_digest(name, tasks),
            files=file_names(name, raw.number, len(tasks), "png") if self._settings.images else (),
            metadata=self._settings.metadata,
        )
        return Line(entry, tasks, len(raw.text or b""))

    def _fields(self, raw: RawLine) -> dict[str, Any]:
        """A line's fields by their names. Raises BadLine."""
        if self._form == "csv":
            if not raw.regular:
                raise BadLine("the row has more or fewer fields than the header")
            return dict(raw.row or {})
        if self._form == "prompts":
            return present(object_of(raw.text))
        try:
            text = decode_text(whole(raw.text), "the line").rstrip("\r\n")
        except ConfigError as error:
            raise BadLine(str(error)) from None
        return dict.fromkeys(TEXT_FIELDS, text)

    def _name(self, fields: dict[str, Any]) -> str | None:
        """The id of an object. Raises BadLine."""
        kind = next((kind for kind in _IDS if kind in fields), None) if self._form == "prompts" else None
        if kind is None:
            return None
        name = fields[kind]
        if isinstance(name, bool) or not isinstance(name, str | int) or not str(name):
            raise BadLine(f"{kind} is neither a text nor a whole number")
        self._names.add(kind, str(name))
        return str(name)

    def _tasks(self, fields: dict[str, Any]) -> tuple[tuple[AnyTask, ...], set[str]]:
        """The task of a line, and the names of the fields that it comes from."""
        prompt, used = self._prompt(fields)
        # A column of a table is data, whatever it is called.
        own = fields if self._form == "prompts" else {}
        kind = _Picture if self._settings.images else _Object
        own = {name: own[name] for name in kind.__struct_fields__ if name in own}
        used |= own.keys()
        if self._settings.images:
            if not isinstance(prompt, str):
                raise BadLine("messages ask for a text, not for an image")
            return (self._image(prompt, convert(own, _Picture)),), used
        return (self._text(prompt, convert(own, _Object)),), used

    def _prompt(self, fields: dict[str, Any]) -> tuple[str | tuple[Message, ...], set[str]]:
        """The prompt, or a whole conversation, and the names of the fields that it comes from."""
        if (template := self._settings.template) is not None:
            return _checked(template.fill(fields)), set(template.fields)
        if self._form == "csv":
            return _checked(fields[self._column]), {self._column}
        if ("prompt" in fields) == ("messages" in fields):
            raise BadLine("expected one of the fields prompt and messages")
        if "messages" in fields:
            return parse_messages(fields["messages"]), {"messages"}
        return _checked(fields["prompt"]), {"prompt"}

    def _text(self, prompt: str | tuple[Message, ...], own: _Object) -> Task:
        settings = self._settings
        system = settings.system if own.system is None else own.system
        if not isinstance(prompt, str):
            if settings.raw:
                raise BadLine("--raw is for prompts, not for messages")
            if own.system is not None:
                raise BadLine("messages and system exclude each other: a message may have the role system")
        elif not settings.raw:
            prompt = (Message("user", prompt),)
        elif system or own.chat_template_kwargs:
            what = "system message" if system else "chat template"
            raise BadLine(f"a raw prompt has no {what}")
        if not isinstance(prompt, str) and system and prompt[0].role != "system":
            prompt = (Message("system", system), *prompt)
        stop = settings.stop if own.stop is None else (own.stop,) if isinstance(own.stop, str) else tuple(own.stop)
        task = Task(
            model=settings.models.text,
            prompt=prompt,
            sampling=_merged(settings.sampling, own),
            stop=check_stop(stop),
            chat_template=settings.chat_template.with_kwargs(own.chat_template_kwargs).unless_default(),
            structured=settings.structured or msgspec.UNSET,
        )
        return with_local_files(task, settings.media)

    def _image(self, prompt: str, own: _Picture) -> ImageTask:
        default, model = self._picture, self._settings.models.image
        width, height = (default.width, default.height) if own.size is None else parse_pixels(own.size)
        negative = own.negative_prompt if own.negative is None else own.negative
        chosen = ImageSettings(
            steps=default.steps if own.steps is None else own.steps,
            width=width,
            height=height,
            guidance=default.guidance if own.guidance is None else own.guidance,
            negative=default.negative if negative is None else negative,
            seed=default.seed if own.seed is None else own.seed,
        ).checked()
        check_size(model.name, chosen)
        if not isinstance(self._init_image, msgspec.UnsetType):
            check_start(chosen, self._init_image.strength)
        return ImageTask(model=model, prompt=prompt, settings=chosen, init_image=self._init_image)


def _merged(sampling: Sampling, own: _Object) -> Sampling:
    """Sampling settings with those of a line in their place. Raises ConfigError for a value out of bounds."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    values = {name: value for name in names if (value := getattr(own, name)) is not None}
    return dataclasses.replace(sampling, **values).checked()


def _named_digest(name: str, tasks: tuple[AnyTask, ...]) -> str:
    return hashlib.sha256(msgspec.json.encode((name, tasks))).hexdigest()


def _column(source: Source, column: str | None) -> str:
    """The column of a table's prompts. Raises ConfigError if it has none of this name, or there is a choice."""
    known = ", ".join(map(repr, source.columns))
    if column is not None:
        if column not in source.columns:
            raise ConfigError(f"{source.name} has no column {column!r}: it has {known}")
        return column
    found = [name for name in PROMPT_COLUMNS if name in source.columns]
    if not found and len(source.columns) > 1:
        raise ConfigError(f"which column has the prompts? Give --column, one of {known}, or --template")
    return found[0] if found else source.columns[0]


def _checked(prompt: object) -> str:
    """Raises BadLine for a prompt that is not a text, or is empty."""
    if not isinstance(prompt, str):
        raise BadLine("the prompt is not a text")
    if not prompt.strip():
        raise BadLine("the prompt is empty")
    return prompt

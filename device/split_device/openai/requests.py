"""Requests in OpenAI's formats, parsed into tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from split_common.errors import SplitError
from split_device.generation.settings import Sampling
from split_device.jobs.job import Message, ModelChoice, Task

CompletionKind = Literal["chat", "text"]

#: The kinds of completion, by path.
COMPLETION_PATHS: dict[str, CompletionKind] = {"/v1/chat/completions": "chat", "/v1/completions": "text"}

#: `max_tokens` of a chat without a limit: generation ends with the model's positions.
UNLIMITED = 2**31 - 1

#: `max_tokens` of a text completion without a limit, as in OpenAI's API.
DEFAULT_TEXT_TOKENS = 16

#: Fields that are accepted and have no effect.
_IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})

#: Fields that are not supported, with the values at which they have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}


class ApiError(SplitError):
    """A request that is refused or failed, as an error of OpenAI's format."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        type_: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type_
        self.param = param
        self.code = code

    def fields(self) -> dict[str, Any]:
        return {"message": str(self), "type": self.type, "param": self.param, "code": self.code}


class _TextPart(msgspec.Struct, frozen=True, tag="text", tag_field="type"):
    text: str


class _ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart]
    name: str | None = None

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of both kinds."""

    model: str
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=4)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class _Chat(_Body, frozen=True, kw_only=True):
    messages: Annotated[list[_ChatMessage], Meta(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None


class _Text(_Body, frozen=True, kw_only=True):
    prompt: (
        Annotated[str, Meta(min_length=1)]
        | Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=1)]
    )
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None


@dataclass(frozen=True)
class Query:
    """A request: one task for each choice of its answer."""

    kind: CompletionKind
    #: The model's name as the request has it.
    model: str
    tasks: tuple[Task, ...]
    stream: bool
    include_usage: bool
    #: The number of alternatives to report with each token; None for no log probabilities.
    logprobs: int | None


def parse(kind: CompletionKind, body: object, model: ModelChoice) -> Query:
    """Parses a body into tasks for `model`, whatever model the body names. Raises ApiError."""
    fields = supported(body, _IGNORED, _NEUTRAL)
    if kind == "chat":
        chat = convert(fields, _Chat)
        prompt: str | tuple[Message, ...] = tuple(message.message() for message in chat.messages)
        limit = chat.max_completion_tokens or chat.max_tokens or UNLIMITED
        return _query(kind, chat, prompt, limit, (chat.top_logprobs or 0) if chat.logprobs else None, model)
    text = convert(fields, _Text)
    prompt = text.prompt if isinstance(text.prompt, str) else text.prompt[0]
    return _query(kind, text, prompt, text.max_tokens or DEFAULT_TEXT_TOKENS, text.logprobs, model)


def _query(
    kind: CompletionKind,
    body: _Body,
    prompt: str | tuple[Message, ...],
    max_tokens: int,
    logprobs: int | None,
    model: ModelChoice,
) -> Query:
    temperature = 1.0 if body.temperature is None else body.temperature
    sampling = Sampling(max_tokens, temperature, 1.0 if body.top_p is None else body.top_p, 0, body.seed)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    tasks = tuple(
        Task(
            model=model,
            prompt=prompt,
            # With one seed, all choices would be the same.
            sampling=sampling if body.seed is None else dataclasses.replace(sampling, seed=body.seed + choice),
            stop=stop,
        )
        for choice in range(body.n or 1)
    )
    options = body.stream_options or _StreamOptions()
    return Query(kind, body.model, tasks, bool(body.stream), options.include_usage, logprobs)


_T = TypeVar("_T")


def supported(body: object, ignored: Collection[str], neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The fields of a body that have an effect: not null, not ignored, and not at a neutral value.

    Raises:
        ApiError: an unsupported field is not at a neutral value.
    """
    if not isinstance(body, dict):
        raise ApiError("the body is not a JSON object")
    fields = {name: value for name, value in body.items() if name not in ignored and value is not None}
    for name, values in neutral.items():
        if name in fields and not any(_same(fields[name], value) for value in values):
            raise ApiError(f"{name} is not supported", param=name, code="unsupported_parameter")
        fields.pop(name, None)
    return fields


def convert(fields: dict[str, Any], type_: type[_T]) -> _T:
    """Converts fields to a struct. Raises ApiError that names the wrong field."""
    try:
        return msgspec.convert(fields, type_)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$.")
        param = where.rstrip("`").split(".")[0].split("[")[0] or None
        raise ApiError(message if param is None else f"{param}: {message}", param=param) from None


def check_model(asked: str, name: str) -> None:
    """Raises ApiError if the request names a model other than the one served."""
    if asked != name:
        raise ApiError(f"the model here is {name}", 404, param="model", code="model_not_found")


def _same(value: Any, other: Any) -> bool:
    """Equality in which False is not 0 and True is not 1."""
    return bool(value == other and isinstance(value, bool) == isinstance(other, bool))

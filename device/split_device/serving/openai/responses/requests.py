"""Requests in the format of the Responses API, parsed into tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from split_device.generation.settings import Sampling
from split_device.generation.structured import StructuredOutputs
from split_device.jobs.job import Message, Task
from split_device.serving.fields import ApiError, convert, present, supported, treated
from split_device.serving.openai.chat import UNLIMITED
from split_device.serving.openai.responses.items import as_items, parse_items
from split_device.serving.openai.responses.tools import ToolNames, parse_tools
from split_device.serving.query import Query
from split_device.serving.text_model import TextModel
from split_device.serving.thinking import thinking_kwargs

#: Fields that are accepted and have no effect. What `include` names beside log probabilities does not come up here,
#: and `max_tool_calls` counts tools that the server runs.
IGNORED = frozenset(
    {
        *("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
        *("service_tier", "stream_options", "max_tool_calls", "client_metadata", "access_programs", "image"),
    }
)

#: Fields that are not supported, with the values at which they have no effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "background_options": ({}, {"completion_window": "soonest"}),
    "context_management": ([],),
    "conversation": (),
    "moderation": (),
    "prompt": (),
    "truncation": ("disabled",),
}

#: The member of `include` that asks for log probabilities.
_LOGPROBS = "message.output_text.logprobs"


class _JsonSchema(msgspec.Struct, frozen=True, tag="json_schema", tag_field="type"):
    name: str
    schema: dict[str, Any]


class _JsonObject(msgspec.Struct, frozen=True, tag="json_object", tag_field="type"):
    pass


class _Plain(msgspec.Struct, frozen=True, tag="text", tag_field="type"):
    pass


class _Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: _Plain | _JsonObject | _JsonSchema | None = None
    verbosity: Literal["medium"] | None = None


class _Reasoning(msgspec.Struct, frozen=True):
    """How much the model shall think. There are no summaries: what it thought is in the answer."""

    effort: str | None = None


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str
    input: str | list[Any]
    instructions: str | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    text: _Text = _Text()
    reasoning: _Reasoning = _Reasoning()
    max_output_tokens: int | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[str] = []
    metadata: dict[str, Any] = {}
    previous_response_id: str | None = None
    store: bool = True
    stream: bool = False
    #: Extensions, as vLLM has them: another sampling setting, and values for variables of the chat template.
    top_k: int | None = None
    seed: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


#: What is done with each field.
FIELDS = treated(_Body.__struct_fields__, IGNORED, NEUTRAL)


@dataclass(frozen=True)
class ResponseRequest:
    """A request, before it is known what was said before it."""

    body: _Body
    #: The items of `input`.
    items: list[Any]
    #: Fields of the request that its answer repeats.
    echoed: dict[str, Any]
    names: ToolNames
    task: Task
    said: list[Message] = field(repr=False)

    @property
    def previous(self) -> str | None:
        """The id of the response that this one goes on from."""
        return self.body.previous_response_id

    def query(self, before: Sequence[Message] = ()) -> Query:
        """The request with a conversation before it, which has no instructions."""
        instructions = [Message("system", self.body.instructions)] if self.body.instructions else []
        messages = (*instructions, *before, *self.said)
        if not messages:
            raise ApiError("input: expected at least one item", param="input")
        body = self.body
        logprobs = body.top_logprobs or 0 if body.top_logprobs or _LOGPROBS in body.include else None
        task = msgspec.structs.replace(
            self.task, prompt=messages, logprobs=msgspec.UNSET if logprobs is None else logprobs
        )
        return Query(body.model, (task,), body.stream)


def _check_answered(body: object) -> None:
    """Raises ApiError for a request that wants no answer, but its prompt computed for later ones."""
    options = body.get("prompt_cache_options") if isinstance(body, dict) else None
    if isinstance(options, dict) and options.get("prewarm") not in (None, False):
        path = "prompt_cache_options.prewarm"
        raise ApiError(f"{path} is not supported", param=path, code="unsupported_parameter")


def parse_response(body: object, model: TextModel) -> ResponseRequest:
    """Parses a request. Raises ApiError."""
    fields = supported(body, IGNORED, NEUTRAL)
    _check_answered(body)
    for name in ("text", "reasoning"):
        if isinstance(value := fields.get(name), dict):
            fields[name] = present(value)
    found = convert(fields, _Body)
    items = as_items(found.input)
    tools = parse_tools(found.tools, found.tool_choice, found.parallel_tool_calls)
    sampling = Sampling(
        found.max_output_tokens or UNLIMITED, found.temperature, found.top_p, found.top_k, found.seed
    ).filled(model.defaults)
    effort = found.reasoning.effort
    thinks = None if effort is None else effort != "none"
    template = model.template.with_kwargs(
        {**thinking_kwargs(model, thinks, effort), **(found.chat_template_kwargs or {})}
    )
    task = Task(
        model=model.choice,
        prompt="",
        sampling=sampling,
        chat_template=template.unless_default(),
        structured=_structured(found.text),
        tool_use=tools.use,
    )
    echoed = _echoed(found, fields, tools.given, model)
    return ResponseRequest(found, items, echoed, tools.names, task, parse_items(items))


def _structured(text: _Text) -> StructuredOutputs | msgspec.UnsetType:
    match text.format:
        case _JsonSchema(schema=schema):
            return StructuredOutputs(json=schema)
        case _JsonObject():
            return StructuredOutputs(json_object=True)
    return msgspec.UNSET


def _echoed(body: _Body, fields: dict[str, Any], tools: list[dict[str, Any]], model: TextModel) -> dict[str, Any]:
    """The fields of a request that its answer repeats, with what holds where it says nothing."""
    sampling = Sampling(1, body.temperature, body.top_p, body.top_k).filled(model.defaults)
    sampling = sampling.resolved(model.loaded.model.generation_config)
    return {
        "model": body.model,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "store": body.store,
        "temperature": sampling.temperature,
        "text": {"format": {"type": "text"}, "verbosity": "medium"} | fields.get("text", {}),
        "tool_choice": body.tool_choice,
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "background": False,
        "user": None,
    }

"""Requests in Anthropic's format, parsed into tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from split_common.errors import ConfigError
from split_device.generation.settings import Sampling, check_stop
from split_device.generation.structured import StructuredOutputs
from split_device.generation.tools import NamedTool, Tool, ToolChoice, ToolUse
from split_device.jobs.job import Task
from split_device.serving.anthropic.conversation import parse_conversation
from split_device.serving.fields import ApiError, convert, present, supported, treated
from split_device.serving.openai.tools import MAX_TOOLS, check_names
from split_device.serving.text_model import TextModel
from split_device.serving.thinking import thinking_kwargs

#: Fields that are accepted and have no effect. Nothing is removed from a conversation.
IGNORED = frozenset(
    {
        *("metadata", "service_tier", "cache_control", "context_management", "inference_geo", "speed"),
        *("diagnostics", "user_profile_id", "workspace_id", "billing_policy", "fallback_credit_token"),
    }
)

#: Fields that are not supported, with the values at which they have no effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "container": (),
    "mcp_servers": ([],),
    "fallbacks": ([], "default"),
    "compaction": (),
    "thread": (),
}

#: Fields of a tool that are accepted and have no effect.
_TOOL_IGNORED = frozenset(
    {"cache_control", "allowed_callers", "defer_loading", "eager_input_streaming", "input_examples"}
)


class _Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool = False
    type: Literal["custom"] = "custom"


class _ToolChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class _Thinking(msgspec.Struct, frozen=True):
    """How a request wants the model to think. A budget of tokens is not enforced."""

    type: Literal["enabled", "disabled", "adaptive"]


class _Format(msgspec.Struct, frozen=True, tag="json_schema", tag_field="type"):
    schema: dict[str, Any]


class _OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: _Format | None = None


class _Counted(msgspec.Struct, frozen=True, kw_only=True):
    """Fields from which the prompt is made."""

    model: str
    messages: list[Any]
    system: str | list[Any] | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: _ToolChoice = _ToolChoice("auto")
    thinking: _Thinking = _Thinking("adaptive")
    output_config: _OutputConfig = _OutputConfig()
    output_format: _Format | None = None
    #: An extension, as vLLM has it: values for variables of the chat template.
    chat_template_kwargs: dict[str, Any] | None = None


class _Body(_Counted, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_tokens: int
    stop_sequences: list[str] = []
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool = False


#: What is done with each field.
FIELDS = treated(_Body.__struct_fields__, IGNORED, NEUTRAL)


@dataclass(frozen=True)
class MessageQuery:
    """A request for one message."""

    #: The model's name as the request has it.
    model: str
    task: Task
    stream: bool = False


def parse_message(body: object, model: TextModel) -> MessageQuery:
    """Parses a request for a message. Raises ApiError."""
    found = convert(supported(body, IGNORED, NEUTRAL), _Body)
    query = _query(found, model)
    sampling = Sampling(found.max_tokens, found.temperature, found.top_p, found.top_k).filled(model.defaults)
    try:
        stop = check_stop(tuple(filter(None, found.stop_sequences)), "stop_sequences")
    except ConfigError as error:
        raise ApiError(str(error), param="stop_sequences") from None
    task = msgspec.structs.replace(query.task, sampling=sampling, stop=stop)
    return MessageQuery(query.model, task, found.stream)


def parse_count(body: object, model: TextModel) -> MessageQuery:
    """Parses a request for the number of a prompt's tokens. Raises ApiError."""
    return _query(convert(supported(body, IGNORED, NEUTRAL), _Counted), model)


def _query(body: _Counted, model: TextModel) -> MessageQuery:
    messages = parse_conversation(body.system, body.messages)
    if not messages:
        raise ApiError("messages: expected at least one that is not empty", param="messages")
    last = messages[-1]
    if last.role == "assistant" and last.tool_calls is not msgspec.UNSET:
        raise ApiError("messages: the last message calls tools, whose results are missing", param="messages")
    output = body.output_format or body.output_config.format
    template = model.template.with_kwargs(
        {**thinking_kwargs(model, _thinks(body), body.output_config.effort), **(body.chat_template_kwargs or {})}
    )
    task = Task(
        model=model.choice,
        prompt=messages,
        chat_template=template.unless_default(),
        # As in Anthropic's API, the answer goes on with the assistant's last words.
        continue_final_message=last.role == "assistant" or msgspec.UNSET,
        tool_use=_tool_use(body),
        structured=msgspec.UNSET if output is None else StructuredOutputs(json=output.schema),
    )
    return MessageQuery(body.model, task)


def _thinks(body: _Counted) -> bool | None:
    """Whether the model shall think; None leaves it to the chat template."""
    return {"enabled": True, "disabled": False, "adaptive": None}[body.thinking.type]


def _tool_use(body: _Counted) -> ToolUse | msgspec.UnsetType:
    tools = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools[: MAX_TOOLS + 1]))
    check_names([tool.name for tool in tools])
    choice = body.tool_choice
    if not tools:
        if choice.type in ("any", "tool"):
            raise ApiError("tool_choice needs tools", param="tool_choice")
        return msgspec.UNSET
    return ToolUse(tools=tools, choice=_choice(choice, tools), parallel=not choice.disable_parallel_tool_use)


def _tool(tool: dict[str, Any], where: str) -> Tool:
    kind = tool.get("type") or "custom"
    if kind != "custom":
        raise ApiError(
            f"{where}.type: {kind!r} is a tool of Anthropic's own, which is not here",
            param=f"{where}.type",
            code="unsupported_parameter",
        )
    fields = {name: value for name, value in present(tool).items() if name not in _TOOL_IGNORED}
    found = convert(fields, _Tool, where)
    return Tool(name=found.name, description=found.description, parameters=found.input_schema, strict=found.strict)


def _choice(choice: _ToolChoice, tools: tuple[Tool, ...]) -> ToolChoice:
    match choice.type:
        case "any":
            return "required"
        case "auto" | "none":
            return choice.type
    if choice.name not in [tool.name for tool in tools]:
        raise ApiError(f"tool_choice.name: no tool is called {choice.name!r}", param="tool_choice.name")
    return NamedTool(choice.name)

"""Tools in the format of the Responses API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from split_device.generation.tools import NamedTool, Tool, ToolChoice, ToolUse
from split_device.serving.fields import ApiError, convert, present
from split_device.serving.openai.responses.items import CUSTOM_INPUT
from split_device.serving.openai.tools import MAX_TOOLS, check_names

#: Tools that OpenAI's servers run, and which agents offer without being asked. The model is not told of them.
LEFT_OUT = frozenset({"web_search", "web_search_preview", "image_generation", "tool_search"})

#: Fields of a tool that are accepted and have no effect.
_IGNORED = frozenset({"defer_loading", "output_schema"})


class _Function(msgspec.Struct, frozen=True, tag="function", tag_field="type", forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


class _Custom(msgspec.Struct, frozen=True, tag="custom", tag_field="type", forbid_unknown_fields=True):
    """A tool that takes a text. Its grammar is a hint: it stands in the description, and is not enforced."""

    name: str
    description: str | None = None
    format: dict[str, Any] | None = None


class _Parsed(msgspec.Struct, frozen=True):
    tools: _Function | _Custom


class _Named(msgspec.Struct, frozen=True):
    type: Literal["function", "custom"]
    name: str


class _Allowed(msgspec.Struct, frozen=True, tag="allowed_tools", tag_field="type"):
    mode: Literal["auto", "required"]
    tools: list[_Named]


class _Choice(msgspec.Struct, frozen=True):
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any]


@dataclass(frozen=True)
class Tools:
    """The tools of a request."""

    use: ToolUse | msgspec.UnsetType
    #: Names of the tools that take a text.
    custom: frozenset[str]
    #: The tools as the request has them, but for those that are left out.
    given: list[dict[str, Any]]


def parse_tools(tools: list[dict[str, Any]], choice: object, parallel: bool) -> Tools:
    """Parses the fields `tools`, `tool_choice` and `parallel_tool_calls`. Raises ApiError."""
    found: list[Tool] = []
    custom: list[str] = []
    given: list[dict[str, Any]] = []
    for index, tool in enumerate(tools[: MAX_TOOLS + 1]):
        if tool.get("type") in LEFT_OUT:
            continue
        parsed = _parse(tool, f"tools[{index}]")
        found.append(parsed)
        given.append(tool)
        if tool["type"] == "custom":
            custom.append(parsed.name)
    check_names([tool.name for tool in found])
    chosen, allowed = _choice(choice, [tool.name for tool in found])
    usable = tuple(tool for tool in found if tool.name in allowed)
    if not usable:
        if chosen not in ("auto", "none"):
            raise ApiError("tool_choice needs tools", param="tool_choice")
        return Tools(msgspec.UNSET, frozenset(), given)
    return Tools(ToolUse(tools=usable, choice=chosen, parallel=parallel), frozenset(custom), given)


def _parse(tool: dict[str, Any], where: str) -> Tool:
    if tool.get("type") not in ("function", "custom"):
        raise ApiError(
            f"{where}.type: {tool.get('type')!r} is not a tool that can be called from here",
            param=f"{where}.type",
            code="unsupported_parameter",
        )
    fields = {name: value for name, value in present(tool).items() if name not in _IGNORED}
    try:
        parsed = convert({"tools": fields}, _Parsed).tools
    except ApiError as error:
        raise ApiError(f"{where}{str(error).removeprefix('tools')}", param=where, code=error.code) from None
    if isinstance(parsed, _Function):
        return Tool(
            name=parsed.name,
            description=parsed.description,
            parameters=parsed.parameters,
            strict=parsed.strict,
        )
    grammar = (parsed.format or {}).get("definition", "")
    description = "\n".join(filter(None, [parsed.description, str(grammar)]))
    schema = {"type": "object", "properties": {CUSTOM_INPUT: {"type": "string"}}, "required": [CUSTOM_INPUT]}
    return Tool(name=parsed.name, description=description or None, parameters=schema)


def _choice(choice: object, names: list[str]) -> tuple[ToolChoice, list[str]]:
    """Whether tools are to be called, and the names of those that may be."""
    found = convert({"tool_choice": choice}, _Choice).tool_choice
    if not isinstance(found, dict):
        return found, names
    if found.get("type") == "allowed_tools":
        allowed = convert(found, _Allowed, "tool_choice")
        return allowed.mode, [_known(tool.name, names) for tool in allowed.tools]
    if found.get("type") not in ("function", "custom"):
        raise ApiError(
            f"tool_choice.type: {found.get('type')!r} is not a tool that can be called from here",
            param="tool_choice.type",
            code="unsupported_parameter",
        )
    name = convert(found, _Named, "tool_choice").name
    return NamedTool(_known(name, names)), names


def _known(name: str, names: list[str]) -> str:
    if name not in names:
        raise ApiError(f"tool_choice: no tool is called {name!r}", param="tool_choice")
    return name

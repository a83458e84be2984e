"""Tools in the format of the Responses API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from split_device.generation.tools import NamedTool, Tool, ToolChoice, ToolUse
from split_device.serving.fields import ApiError, convert, present
from split_device.serving.openai.responses.items import CUSTOM_INPUT, qualified
from split_device.serving.openai.tools import MAX_TOOLS, check_names

#: Tools that OpenAI's servers run, and which agents offer without being asked. The model is not told of them.
LEFT_OUT = ("web_search", "web_search_preview", "image_generation", "tool_search")

#: Fields of a tool that are accepted and have no effect.
_IGNORED = frozenset({"defer_loading", "output_schema", "allowed_callers"})


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


class _Namespace(msgspec.Struct, frozen=True, tag="namespace", tag_field="type"):
    """Tools whose names belong together."""

    name: str
    tools: list[dict[str, Any]]
    description: str | None = None


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
class ToolNames:
    """What is to be known of tools to write calls of them, by the names by which the model knows them."""

    #: Tools that take a text.
    custom: frozenset[str] = frozenset()
    #: The namespaces of tools that have one, and their names in it.
    namespaces: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Tools:
    """The tools of a request."""

    use: ToolUse | msgspec.UnsetType
    names: ToolNames
    #: The tools as the request has them, but for those that are left out.
    given: list[dict[str, Any]]


def parse_tools(tools: list[dict[str, Any]], choice: object, parallel: bool) -> Tools:
    """Parses the fields `tools`, `tool_choice` and `parallel_tool_calls`. Raises ApiError."""
    found: list[Tool] = []
    custom: list[str] = []
    namespaces: dict[str, tuple[str, str]] = {}
    given = [tool for tool in tools if tool.get("type") not in LEFT_OUT]
    for namespace, tool, where in _flat(tools):
        parsed = _parse(tool, where)
        name = qualified(namespace, parsed.name)
        if namespace:
            namespaces[name] = (namespace, parsed.name)
        if tool["type"] == "custom":
            custom.append(name)
        found.append(msgspec.structs.replace(parsed, name=name))
    check_names([tool.name for tool in found])
    chosen, allowed = _choice(choice, [tool.name for tool in found])
    usable = tuple(tool for tool in found if tool.name in allowed)
    if not usable:
        if chosen not in ("auto", "none"):
            raise ApiError("tool_choice needs tools", param="tool_choice")
        return Tools(msgspec.UNSET, ToolNames(), given)
    use = ToolUse(tools=usable, choice=chosen, parallel=parallel)
    return Tools(use, ToolNames(frozenset(custom), namespaces), given)


def _flat(tools: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The tools but for those that are left out: with their namespace, "" for none, and their path."""
    for index, tool in enumerate(tools[: MAX_TOOLS + 1]):
        where = f"tools[{index}]"
        if tool.get("type") == "namespace":
            space = convert(tool, _Namespace, where)
            for inner, each in enumerate(space.tools):
                yield space.name, each, f"{where}.tools[{inner}]"
        elif tool.get("type") not in LEFT_OUT:
            yield "", tool, where


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

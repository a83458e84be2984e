"""Tools in OpenAI's format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from split_device.generation.tools import TOOL_NAME, NamedTool, Tool, ToolChoice, ToolUse
from split_device.serving.fields import ApiError, convert, present, supported

#: The fields of a chat's body.
FIELDS = ("tools", "tool_choice", "parallel_tool_calls")

#: Most tools of a request.
MAX_TOOLS = 512


class _Function(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


def take_tools(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a chat's body, with one, `tool_use`, in place of `tools` and those that say how to use them.

    Raises:
        ApiError: one of them is wrong, or not supported.
    """
    left = dict(fields)
    given = {name: left.pop(name, None) for name in FIELDS}
    if "tool_use" in left:
        raise ApiError("tool_use: unknown field")
    if use := parse_tool_use(given["tools"], given["tool_choice"], given["parallel_tool_calls"]):
        left["tool_use"] = use
    return left


def parse_tool_use(tools: object, choice: object, parallel: object) -> ToolUse | None:
    """What the fields `tools`, `tool_choice` and `parallel_tool_calls` say; None for no tools.

    Raises:
        ApiError: one of them is wrong, or not supported. The error names the tool and its wrong field.
    """
    found = _tools(tools)
    chosen = _choice(choice, found)
    if not isinstance(parallel, bool | None):
        raise ApiError("parallel_tool_calls: expected true or false", param="parallel_tool_calls")
    return ToolUse(tools=found, choice=chosen, parallel=parallel is not False) if found else None


def _tools(tools: object) -> tuple[Tool, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise ApiError("tools: expected a list", param="tools")
    found = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools[: MAX_TOOLS + 1]))
    check_names([tool.name for tool in found], "function.name")
    return found


def _tool(tool: object, where: str) -> Tool:
    fields = supported(tool, (), {}, where)
    _check_type(fields, where)
    function = supported(fields.get("function"), (), {}, f"{where}.function")
    found = convert(function, _Function, f"{where}.function")
    return Tool(name=found.name, description=found.description, parameters=found.parameters, strict=found.strict)


def check_names(names: Sequence[str], field: str = "name") -> None:
    """Raises ApiError if tools have a name that they cannot have, or two have one, or they are too many.

    Args:
        names: those of all tools, in their order.
        field: where a tool has its name.
    """
    if len(names) > MAX_TOOLS:
        raise ApiError(f"tools: more than {MAX_TOOLS}", param="tools")
    seen: set[str] = set()
    for index, name in enumerate(names):
        where = f"tools[{index}].{field}"
        if not TOOL_NAME.fullmatch(name):
            raise ApiError(f"{where}: expected 1 to 128 letters, digits, dots, dashes and underscores", param=where)
        if name in seen:
            raise ApiError(f"{where}: another tool is called {name}", param=where)
        seen.add(name)


def _check_type(fields: dict[str, Any], where: str) -> None:
    if (kind := fields.get("type", "function")) != "function":
        raise _unsupported(f"{where}.type", kind)


def _unsupported(where: str, value: object) -> ApiError:
    return ApiError(f"{where}: {value!r} is not supported", param=where, code="unsupported_parameter")


def _choice(choice: object, tools: tuple[Tool, ...]) -> ToolChoice:
    """How tools are called. Raises ApiError for what is not a choice, or needs a tool that is not there."""
    if choice in (None, "auto", "none"):
        return "none" if choice == "none" else "auto"
    if not tools:
        raise ApiError("tool_choice needs tools", param="tool_choice")
    if choice == "required":
        return "required"
    if not isinstance(choice, dict):
        raise _unsupported("tool_choice", choice)
    _check_type(present(choice), "tool_choice")
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if name not in [tool.name for tool in tools]:
        raise ApiError(f"tool_choice: no tool is called {name!r}", param="tool_choice")
    return NamedTool(str(name))

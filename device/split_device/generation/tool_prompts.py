"""Tools in prompts: as the chat template shows them, or spelled out where it knows none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from split_device.generation.tool_styles import GENERAL
from split_device.generation.tools import Tool, ToolUse

_INTRODUCTION = """\
You can call tools. Each line between <tools> and </tools> describes one as JSON:
<tools>
{tools}
</tools>
To call a tool, write its name and its arguments as JSON between <tool_call> and </tool_call>:
{example}"""


def shown_tools(tool_use: ToolUse | None) -> list[dict[str, Any]]:
    """The tools as a chat template takes them; none if none may be called."""
    if tool_use is None or tool_use.choice == "none":
        return []
    return [{"type": "function", "function": _function(tool)} for tool in tool_use.tools]


def spelled_out(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], system: bool = True
) -> list[dict[str, Any]]:
    """A conversation for a chat template that knows no tools: they become text, in the general form.

    Args:
        messages: as transformers documents them, those of tools and with calls included.
        tools: what `shown_tools` returned.
        system: whether the tools are described in the system message. If not, it is in the first message.
    """
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    assert GENERAL.form is not None
    example = GENERAL.form.text("NAME", "{...}")
    introduction = _INTRODUCTION.format(tools=lines, example=example)
    if plain and (not system or plain[0]["role"] == "system"):
        first = {**plain[0], "content": f"{plain[0]['content']}\n\n{introduction}".lstrip()}
        return [first, *plain[1:]]
    return [{"role": "system", "content": introduction}, *plain]


def _function(tool: Tool) -> dict[str, Any]:
    described = {} if tool.description is None else {"description": tool.description}
    return {"name": tool.name, **described, "parameters": tool.parameters or {"type": "object", "properties": {}}}


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message that has a role and a content, and nothing else. A tool's result is a message of the user."""
    content = message["content"]
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    assert GENERAL.form is not None
    calls = []
    for call in message.get("tool_calls", ()):
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(GENERAL.form.text(function["name"], text))
    return {"role": message["role"], "content": "\n".join(filter(None, [content, *calls]))}

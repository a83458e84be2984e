"""Tools in prompts: shown by the chat template, or spelled out where it knows none."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

import tiny
from split_common.errors import ConfigError, UnsupportedField
from split_device.generation.answers import answer_format
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.tokenizing import encode_chat
from split_device.generation.tools import NamedTool, Tool, ToolCall, ToolUse
from split_device.jobs.conversation import chat_messages
from split_device.jobs.job import Message
from split_device.serving.openai.messages import parse_messages

PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}}
TOOL = Tool(name="f", description="Does it.", parameters=PARAMETERS)
USE = ToolUse(tools=(TOOL,))

#: One that shows tools, calls, results and thinking.
SHOWING = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content or '' }}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>"
    "{{ call.function.name }}={{ call.function.arguments.a }}</tool_call>"
    "{% endfor %}{{ m.name or '' }};{% endfor %}{% if enable_thinking %}!{% endif %}"
)
CONVERSATION = (
    Message("user", "Hi"),
    Message(
        "assistant", "Wait.", tool_calls=(ToolCall(id="x", name="f", arguments='{"a": "b"}'),), reasoning="Hm."
    ),
    Message("tool", "done", tool_call_id="x"),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def prompt(tokenizer: Any, template: ChatTemplate, tool_use: ToolUse | None = USE) -> str:
    messages = chat_messages(CONVERSATION, template.source(tokenizer))
    ids = encode_chat(tokenizer, messages, template=template, tool_use=tool_use)
    return str(tokenizer.decode(ids[0], skip_special_tokens=False))


def test_a_template_shows_tools(tokenizer: Any) -> None:
    """Arguments of calls are objects to it, and a result has the name of its tool."""
    shown = "user:Hi;assistant:Hm.Wait.<tool_call>f=b</tool_call>;tool:donef;"
    assert prompt(tokenizer, ChatTemplate(SHOWING)) == "[f]" + shown
    assert prompt(tokenizer, ChatTemplate(SHOWING), None) == shown
    assert prompt(tokenizer, ChatTemplate(SHOWING), ToolUse(tools=(TOOL,), choice="none")) == shown


def test_tools_are_spelled_out(tokenizer: Any) -> None:
    text = prompt(tokenizer, ChatTemplate())
    assert text.startswith("system:You can call tools.")
    assert '{"name": "f", "description": "Does it.", "parameters": {"type": "object", ' in text
    assert text.endswith(
        'user:Hi</s>assistant:Wait.\n<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call></s>'
        "user:<tool_response>\ndone\n</tool_response></s>assistant:"
    )
    assert "You can call tools" not in prompt(tokenizer, ChatTemplate(), None)


def test_arguments_are_text_or_an_object() -> None:
    def parsed(arguments: Any) -> ToolCall:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        (message,) = parse_messages([{"role": "assistant", "tool_calls": [call]}])
        (found,) = message.tool_calls or ()
        return found

    assert parsed({"a": "b"}) == parsed('{"a":"b"}') == ToolCall(id="1", name="f", arguments='{"a":"b"}')


def test_a_template_without_system_messages(tokenizer: Any) -> None:
    refusing = ChatTemplate(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}{{ m.content }};{% endfor %}"
    )
    assert prompt(tokenizer, refusing).startswith("Hi\n\nYou can call tools.")
    with pytest.raises(ConfigError, match="refuses this conversation: no"):
        encode_chat(tokenizer, [{"role": "system", "content": "x"}], template=refusing, tool_use=USE)


def test_how_much_to_think(tokenizer: Any) -> None:
    """By the variable of that name, by a switch, or not at all."""
    reading = ChatTemplate("{{ reasoning_effort }}")
    assert prompt(tokenizer, reading.with_reasoning_effort("low"), None) == "low"
    switch = ChatTemplate(SHOWING)
    assert prompt(tokenizer, switch.with_reasoning_effort("low"), None).endswith("!")
    assert not prompt(tokenizer, switch.with_reasoning_effort("none"), None).endswith("!")
    deaf = ChatTemplate("{{ messages[0].content }}")
    assert prompt(tokenizer, deaf.with_reasoning_effort("none"), None) == "Hi"
    with pytest.raises(UnsupportedField, match="reasoning_effort 'low' has no effect") as refused:
        prompt(tokenizer, deaf.with_reasoning_effort("low"), None)
    assert refused.value.field == "reasoning_effort"


def test_a_tokenizer_s_own_response_template(tokenizer: Any) -> None:
    """It reads answers in place of a known style; calls are forced into its form, if it has a plain one."""
    own = {
        "start_anchor": "assistant:",
        "fields": {
            "content": {"content": "text"},
            "tool_calls": {
                "open": "<call>",
                "close": "</call>",
                "content": "json",
                "repeats": True,
                "transform": {"function": "{content}"},
            },
        },
    }
    tokenizer.response_template = own
    try:
        forced = ToolUse(tools=(TOOL,), choice=NamedTool("f"))
        assert answer_format(tokenizer, ChatTemplate(), forced).form.text("f", "{}").startswith("<call>")
        read = answer_format(tokenizer, ChatTemplate(), USE)
        assert read.template == own
        assert read.prefix(tokenizer, tokenizer("user:x</s>assistant:")["input_ids"]).endswith("assistant:")
        unused = answer_format(tokenizer, ChatTemplate())
        assert unused.template is not None
        assert "tool_calls" not in unused.template["fields"]
        own["fields"]["tool_calls"] |= {"content": "kv-lines"}  # type: ignore[index]
        assert answer_format(tokenizer, ChatTemplate(), forced).form.text("f", "{}").startswith("<tool_call>")
    finally:
        tokenizer.response_template = None

"""Thinking, text and calls of tools as items and blocks, whole and as events; and responses that are kept."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from split_device.generation.tools import ToolCall
from split_device.jobs.job import Message, MessageImage
from split_device.jobs.store import Store, store_path
from split_device.serving.anthropic.answers import block_event, end_events, message
from split_device.serving.anthropic.conversation import parse_conversation
from split_device.serving.anthropic.requests import FIELDS as MESSAGES_FIELDS
from split_device.serving.choices import Choice, ToolCallDelta
from split_device.serving.fields import ApiError
from split_device.serving.openai.answers import chat_piece
from split_device.serving.openai.chat import FIELDS as CHAT_FIELDS
from split_device.serving.openai.image_requests import FIELDS as IMAGE_FIELDS
from split_device.serving.openai.responses.answers import ResponseEvents, ResponseWriter
from split_device.serving.openai.responses.items import parse_items
from split_device.serving.openai.responses.requests import FIELDS as RESPONSES_FIELDS
from split_device.serving.openai.responses.store import ResponseStore, StoredResponse
from split_device.serving.openai.responses.tools import ToolNames, parse_tools
from split_device.serving.openai.text import FIELDS as TEXT_FIELDS
from split_device.serving.parts import Parts, whole

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"

PIECES = [
    Choice("", 1, None, reasoning="Let me "),
    Choice("I ", 1, None, reasoning="think."),
    Choice("call.", 1, None, tool_calls=(ToolCallDelta(0, "", "call_a", "f"),)),
    Choice("", 1, None, tool_calls=(ToolCallDelta(0, '{"x":'), ToolCallDelta(0, " 1}"))),
    Choice(
        "", 1, None, tool_calls=(ToolCallDelta(1, '{"input": "p', "call_b", "patch"), ToolCallDelta(1, '\\n"}'))
    ),
    Choice("", 1, "tool_calls"),
]
WHOLE = Choice(
    "I call.",
    6,
    "tool_calls",
    reasoning="Let me think.",
    tool_calls=tuple(call for piece in PIECES for call in piece.tool_calls),
)

#: What the answer above is in a conversation.
SAID = Message(
    "assistant",
    "I call.",
    tool_calls=(
        ToolCall(id="call_a", name="f", arguments='{"x": 1}'),
        ToolCall(id="call_b", name="patch", arguments='{"input": "p\\n"}'),
    ),
    reasoning="Let me think.",
)


def happened(pieces: list[Choice]) -> tuple[Parts, list[Any]]:
    parts = Parts()
    return parts, [event for piece in pieces for event in parts.push(piece)]


def test_pieces_come_to_the_same_parts() -> None:
    parts, events = happened(PIECES)
    assert parts.parts == whole(WHOLE).parts
    assert [part.kind for part in parts.parts] == ["reasoning", "text", "call", "call"]
    for part in parts.parts:
        own = [event for event in events if event.part is part]
        assert [event.kind for event in own[:: len(own) - 1]] == ["begin", "end"]
        assert "".join(event.text for event in own) == part.text


def test_the_rest_of_a_call_comes_before_text_that_follows_it() -> None:
    begun = Choice("", 1, None, tool_calls=(ToolCallDelta(0, '{"x":', "call_a", "f"),))
    parts, _ = happened([begun, Choice("done", 1, "stop", tool_calls=(ToolCallDelta(0, " 1}"),))])
    assert [(part.kind, part.text, part.call_id) for part in parts.parts] == [
        ("call", '{"x": 1}', "call_a"),
        ("text", "done", ""),
    ]


def test_a_call_that_is_cut_off_is_not_completed() -> None:
    cut_off = Choice("", 1, "length", tool_calls=(ToolCallDelta(0, '{"x":', "call_a", "f"),))
    parts, events = happened([cut_off])
    writer = ResponseWriter("1", 0, {}, ToolNames(), 3)
    streamed = ResponseEvents(writer)
    written = [data for event in events for data in streamed.part(event)]
    assert written[-1]["type"] == "response.output_item.done"
    assert written[-1]["item"] == writer.response(parts)["output"][0]
    assert written[-1]["item"]["status"] == "incomplete"


def test_blocks() -> None:
    parts, events = happened(PIECES)
    said = message("1", "m", 10, whole(WHOLE), cached=4)
    blocks: dict[int, Any] = {}
    for event in map(block_event, events):
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks[event["index"]] = event["content_block"] | {"json": ""}
        elif event["type"] == "content_block_delta":
            block, delta = blocks[event["index"]], event["delta"]
            field = {"thinking_delta": "thinking", "text_delta": "text"}.get(delta["type"], "json")
            block[field] += delta[field if field != "json" else "partial_json"]
    assert [block.pop("json") for block in blocks.values()] == ["", "", '{"x": 1}', '{"input": "p\\n"}']
    assert said["content"][:2] == [blocks[0], blocks[1]]
    assert said["content"][2] == {"type": "tool_use", "id": "call_a", "name": "f", "input": {"x": 1}}
    assert said["stop_reason"] == "tool_use"
    assert (said["usage"]["input_tokens"], said["usage"]["cache_read_input_tokens"]) == (6, 4)
    assert next(end_events(10, parts, 4))["usage"] == said["usage"]
    assert parse_conversation(None, [{"role": "assistant", "content": said["content"]}]) == (SAID,)


def test_results_of_tools_are_messages() -> None:
    results = [
        {"type": "tool_result", "tool_use_id": "call_a", "content": [{"type": "text", "text": "2"}]},
        {"type": "tool_result", "tool_use_id": "call_b", "is_error": True},
        {"type": "text", "text": "Go on"},
    ]
    assert parse_conversation(None, [{"role": "user", "content": results}]) == (
        Message("tool", "2", tool_call_id="call_a"),
        Message("tool", "", tool_call_id="call_b"),
        Message("user", "Go on"),
    )


def test_images_lie_between_texts() -> None:
    data = MessageImage(at=1, data=b"png")
    expected = Message("user", "ab", images=(data,))
    source = {"type": "base64", "media_type": "image/png", "data": "cG5n"}
    texts = [{"type": "text", "text": text} for text in "ab"]
    blocks = [texts[0], {"type": "image", "source": source}, texts[1]]
    assert parse_conversation(None, [{"role": "user", "content": blocks}]) == (expected,)
    inputs = [{"type": "input_text", "text": text} for text in "ab"]
    image = {"type": "input_image", "image_url": "data:image/png;base64,cG5n", "detail": "auto"}
    assert parse_items([{"type": "message", "role": "user", "content": [inputs[0], image, inputs[1]]}]) == [
        expected
    ]
    with pytest.raises(ApiError, match="only messages of the user have images"):
        parse_items([{"type": "function_call_output", "call_id": "a", "output": [image]}])


def writer() -> ResponseWriter:
    echoed = {"model": "m", "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "text": {}}
    return ResponseWriter("1", 0, echoed, ToolNames(frozenset(["patch"]), {"a__f": ("a", "f")}), 10)


def test_chunks_of_a_chat() -> None:
    """OpenAI's first chunk has a content, even if it is empty; a last one without text has an empty delta."""
    assert chat_piece(0, Choice("", 1, None), first=True)["delta"] == {"role": "assistant", "content": ""}
    assert chat_piece(0, Choice("Hi", 1, None), first=False)["delta"] == {"content": "Hi"}
    last = chat_piece(0, Choice("", 0, "stop"), first=False)
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")


def test_events_of_a_response() -> None:
    parts, found = happened(PIECES)
    events = ResponseEvents(writer())
    written = [*events.begin(), *(data for event in found for data in events.part(event))]
    response = writer().response(whole(WHOLE))
    written.append(events.end(response))
    assert writer().response(parts) == response
    Response.model_validate(response)
    for data in written:
        TypeAdapter(ResponseStreamEvent).validate_python(data)
    assert [item["type"] for item in response["output"]] == [
        *("reasoning", "message", "function_call", "custom_tool_call")
    ]
    done = [data["item"] for data in written if data["type"] == "response.output_item.done"]
    assert done == response["output"]
    arguments = [data["delta"] for data in written if data["type"] == "response.function_call_arguments.delta"]
    assert arguments == ['{"x":', " 1}"]
    inputs = [data["delta"] for data in written if data["type"] == "response.custom_tool_call_input.delta"]
    assert inputs == ["p\n"] == [response["output"][3]["input"]]
    assert written[-1]["type"] == "response.completed"
    assert parse_items(response["output"]) == [SAID]


def test_items_of_a_conversation() -> None:
    outputs = [
        {"type": "function_call_output", "call_id": "call_a", "output": "2"},
        {"type": "custom_tool_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "3"}]},
    ]
    assert parse_items(outputs) == [
        Message("tool", "2", tool_call_id="call_a"),
        Message("tool", "3", tool_call_id="b"),
    ]


def test_tools_that_openai_runs_are_left_out() -> None:
    function = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": None}
    tools = parse_tools([{"type": "web_search", "external_web_access": False}, function], "auto", True)
    assert [tool["name"] for tool in tools.given] == ["f"]
    with pytest.raises(ApiError, match="tool_choice needs tools"):
        parse_tools([{"type": "web_search"}], "required", True)
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}
    other = {**function, "name": "g"}
    with pytest.raises(ApiError, match=r"tools\[1\]\.name: another tool is called f"):
        parse_tools([function, function], "auto", True)
    assert [tool.name for tool in parse_tools([function, other], allowed, True).use.tools] == ["f"]  # type: ignore[union-attr]
    with pytest.raises(ApiError, match="no tool is called 'h'"):
        parse_tools([function], {"type": "function", "name": "h"}, True)


@pytest.mark.parametrize(
    ("headings", "fields"),
    [
        (("Fields of both", "Fields of chats"), CHAT_FIELDS),
        (("Fields of both", "Fields of texts"), TEXT_FIELDS),
        (("Responses",), RESPONSES_FIELDS),
        (("Messages",), MESSAGES_FIELDS),
        (("Images",), IMAGE_FIELDS),
    ],
)
def test_the_docs_name_every_field(headings: tuple[str, ...], fields: dict[str, str]) -> None:
    sections = dict(re.findall(r"^##+ (.*)\n((?:(?!##).*\n?)*)", DOCS.read_text(), re.MULTILINE))
    rows = [
        (name, done)
        for heading in headings
        for names, done in re.findall(r"^\| (`.*?`) \| (\w+) \|", sections[heading], re.MULTILINE)
        for name in re.findall("`(.*?)`", names)
    ]
    assert sorted(rows) == sorted(fields.items())


def test_tools_of_a_namespace_keep_their_names() -> None:
    inner = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    tools = parse_tools([inner, {"type": "namespace", "name": "a", "tools": [inner]}], "auto", True)
    assert [tool.name for tool in tools.use.tools] == ["f", "a__f"]  # type: ignore[union-attr]
    assert tools.names.namespaces == {"a__f": ("a", "f")}
    parts = whole(Choice("", 1, "tool_calls", tool_calls=(ToolCallDelta(0, "{}", "call_a", "a__f"),)))
    (item,) = writer().response(parts)["output"]
    assert (item["namespace"], item["name"]) == ("a", "f")
    call = ToolCall(id="call_a", name="a__f", arguments="{}")
    assert parse_items([item]) == [Message("assistant", "", tool_calls=(call,))]


# --- responses that are kept -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))


def stored(name: str, previous: str | None = None, text: str = "") -> StoredResponse:
    return StoredResponse(id=name, previous=previous, input=[{"text": text}], response={})


def ids(store: ResponseStore, name: str) -> list[str]:
    return [each.id for each in asyncio.run(store.chain(name))]


def test_the_ones_that_were_not_used_go_first() -> None:
    store = ResponseStore(most=3)
    for name, previous in (("a", None), ("b", "a"), ("c", None)):
        asyncio.run(store.put(stored(name, previous)))
    assert ids(store, "b") == ["a", "b"]
    asyncio.run(store.put(stored("d")))
    assert ids(store, "b") == ["a", "b"]
    with pytest.raises(ApiError, match="'c'"):
        ids(store, "c")
    asyncio.run(store.delete("a"))
    with pytest.raises(ApiError, match="'a'"):
        ids(store, "b")
    store.close()


def test_bytes_and_age_are_bounded() -> None:
    small = ResponseStore(most_bytes=1000)
    for name in ("a", "b"):
        asyncio.run(small.put(stored(name, text="x" * 600)))
    with pytest.raises(ApiError, match="'a'"):
        ids(small, "a")
    small.close()
    brief = ResponseStore(max_age=-1)
    asyncio.run(brief.put(stored("c")))
    assert not asyncio.run(brief.has("c"))
    brief.close()


def test_responses_are_sealed_if_jobs_are(tmp_path: Path) -> None:
    key = tmp_path / "key"
    Store(store_path(), key).close()
    bare = ResponseStore()
    with pytest.raises(ApiError, match=r"is encrypted.*--store-key") as refused:
        asyncio.run(bare.check())
    assert refused.value.param == "store"
    bare.close()
    sealed = ResponseStore(key)
    asyncio.run(sealed.put(stored("a", text="secret words")))
    assert asyncio.run(sealed.get("a")).input == [{"text": "secret words"}]
    sealed.close()
    file = store_path().with_name("responses.db")
    assert file.stat().st_mode & 0o777 == 0o600
    assert b"secret words" not in file.read_bytes()
    with sqlite3.connect(file) as db:
        assert db.execute("SELECT count(*) FROM responses").fetchone() == (1,)

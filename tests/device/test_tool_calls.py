"""Answers read back: what is said, what was thought, and which tools are called, however the text is cut."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import tiny
from split_device.generation.answers import AnswerStream, answer_format
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.tool_calls import AnswerParser, AnswerPiece
from split_device.generation.tool_styles import (
    GENERAL,
    CallStyle,
    call_style,
    form_of,
    open_thinking,
    response_template,
)
from split_device.generation.tools import Tool, joined_calls

WEATHER = Tool(name="get_weather", parameters={"type": "object", "properties": {"days": {"type": "integer"}}})

#: Chat templates of each style, as far as they tell it.
HERMES = "{{ tools }}<tool_call>{{ tool_call }}</tool_call>"
THINKING = HERMES + "<think></think>"
XML = "{{ tools }}<tool_call><function="
ARG_KEYS = "{{ tools }}<tool_call><arg_key>"
MISTRAL = "{{ tools }}[TOOL_CALLS]"
MISTRAL_ARGS = "{{ tools }}[TOOL_CALLS][ARGS]"
LLAMA = '{{ tools }} {"name": "\' "parameters": \''
GRANITE = "{{ tools }}<|tool_call|>"
DEEPSEEK = "{{ tools }}<｜tool▁sep｜></think>"
DEEPSEEK_FENCED = "{{ tools }}<｜tool▁sep｜>```json"
HARMONY = "{{ tools }}<|channel|> to=functions."

CALL = '{"name": "get_weather", "arguments": {"city": "Pa\\"}ris", "days": 2}}'
ARGUMENTS = {"city": 'Pa"}ris', "days": 2}
TEXT_ARGUMENTS = '{"city": "Pa\\"}ris", "days": 2}'


def read(chat_template: str, pieces: Sequence[str], prompt: str = "", **options: Any) -> tuple[Any, AnswerParser]:
    """What an answer is read as, and what read it."""
    template = response_template(chat_template, call_style(chat_template, True))
    assert template is not None
    thinking = open_thinking(prompt)
    parser = AnswerParser(template, thinking[0] if thinking else "", [WEATHER], **options)
    found = AnswerPiece()
    for piece in pieces:
        found += parser.push(piece)
    found += parser.end()
    calls = [(call.id, call.name, call.arguments) for call in joined_calls(found.calls)]
    return (found.text, found.reasoning, calls), parser


def cuts(text: str) -> Iterator[list[str]]:
    """A text whole, in characters, and cut at random."""
    yield [text]
    yield list(text)
    chance = random.Random(text)
    for _ in range(20):
        at = sorted(chance.randrange(len(text) + 1) for _ in range(chance.randrange(1, 9)))
        yield [text[first:last] for first, last in zip([0, *at], [*at, len(text)], strict=True)]


@pytest.mark.parametrize(
    ("chat_template", "answer", "text", "reasoning", "calls"),
    [
        (HERMES, "Hello there. ", "Hello there. ", "", []),
        (HERMES, f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n", "Let me see.", "", [ARGUMENTS]),
        (HERMES, f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", "", [ARGUMENTS] * 2),
        (HERMES, "a < b <tool_calling", "a < b <tool_calling", "", []),
        (THINKING, "<think>\nHm, 1 < 2.\n</think>\n\nYes.", "Yes.", "Hm, 1 < 2.", []),
        (THINKING, f"<think>Hm.</think>\n<tool_call>{CALL}</tool_call>", "", "Hm.", [ARGUMENTS]),
        (THINKING, "<think>Never ends", "", "Never ends", []),
        (
            XML,
            '<tool_call>\n<function=get_weather>\n<parameter=city>\nPa"}ris\n</parameter>\n'
            "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
            "",
            "",
            [ARGUMENTS],
        ),
        (
            ARG_KEYS,
            '<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Pa"}ris</arg_value>\n'
            "<arg_key>days</arg_key><arg_value>2</arg_value>\n</tool_call>",
            "",
            "",
            [ARGUMENTS],
        ),
        (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", "", "", [ARGUMENTS] * 2),
        (MISTRAL_ARGS, f"Well. [TOOL_CALLS]get_weather[ARGS]{TEXT_ARGUMENTS}" * 2, "Well.Well.", "", None),
        (LLAMA, CALL.replace("arguments", "parameters"), "", "", [ARGUMENTS]),
        (LLAMA, "<|python_tag|>" + CALL.replace("arguments", "parameters"), "", "", [ARGUMENTS]),
        (LLAMA, 'It is {"name": "x"}.', 'It is {"name": "x"}.', "", []),
        (GRANITE, f"<|tool_call|>[{CALL}]", "", "", [ARGUMENTS]),
        (
            DEEPSEEK,
            "<think>So.</think>Now<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
            f"{TEXT_ARGUMENTS}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "Now",
            "So.",
            [ARGUMENTS],
        ),
        (
            DEEPSEEK_FENCED,
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
            f"{TEXT_ARGUMENTS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "",
            "",
            [ARGUMENTS],
        ),
        (
            HARMONY,
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
            "<|channel|>commentary to=functions.get_weather "
            f"<|constrain|>json<|message|>{TEXT_ARGUMENTS}<|call|>",
            "",
            "Hm.",
            [ARGUMENTS],
        ),
        (
            HARMONY,
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello<|return|>",
            "Hello",
            "Hm.",
            [],
        ),
    ],
)
def test_an_answer_is_the_same_however_it_is_cut(
    chat_template: str, answer: str, text: str, reasoning: str, calls: list[Any] | None
) -> None:
    expected, _ = read(chat_template, [answer])
    if calls is not None:
        assert expected[:2] == (text, reasoning)
        assert [(name, json.loads(arguments)) for _, name, arguments in expected[2]] == [
            ("get_weather", each) for each in calls
        ]
    for pieces in cuts(answer):
        assert read(chat_template, pieces)[0] == expected


@pytest.mark.parametrize(
    "answer",
    [
        "<tool_call>nothing of the kind</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "get_wea',
        "<tool_call>[1]</tool_call>",
    ],
)
def test_what_is_not_a_call_is_text(answer: str) -> None:
    for pieces in cuts(answer):
        text, _, calls = read(HERMES, pieces)[0]
        assert not calls
        assert text == answer.removesuffix("</tool_call>")


def test_arguments_come_as_they_are_written() -> None:
    """Before the call ends, and without waiting for more than the next character."""
    template = response_template(HERMES, GENERAL)
    assert template is not None
    parser = AnswerParser(template, "", [WEATHER])
    first = parser.push('<tool_call>{"name": "get_weather", "arguments": {"ci')
    assert [(delta.index, delta.id, delta.name) for delta in first.calls] == [
        (0, "call_0", "get_weather"),
        (0, "", ""),
    ]
    assert [delta.arguments for delta in first.calls] == ["", '{"ci']
    assert [delta.arguments for delta in parser.push('ty": 1').calls] == ['ty": 1']
    assert parser.end() == AnswerPiece()
    assert parser.called


def test_a_call_whose_name_comes_last() -> None:
    answer = '<tool_call>{"arguments": {"days": 1}, "name": "get_weather"}</tool_call>'
    for pieces in cuts(answer):
        assert read(HERMES, pieces)[0] == ("", "", [("call_0", "get_weather", '{"days": 1}')])


def test_one_call_ends_an_answer_that_may_have_no_more() -> None:
    answer = f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call> and so on"
    for pieces in cuts(answer):
        (text, _, calls), parser = read(HERMES, pieces, parallel=False)
        assert (text, len(calls), parser.done) == ("", 1, True)
    assert len(read(MISTRAL, [f"[TOOL_CALLS][{CALL}, {CALL}]"], parallel=False)[0][2]) == 1


def test_thinking_that_the_prompt_begins() -> None:
    """Some templates open it, and some close it at once."""
    answer = "Hm.\n</think>\n\nYes."
    for pieces in cuts(answer):
        assert read(THINKING, pieces, "<|im_start|>assistant\n<think>\n")[0] == ("Yes.", "Hm.", [])
    assert read(THINKING, ["Yes."], "<think>\n\n</think>\n\n")[0] == ("Yes.", "", [])


def test_tokens_of_thinking_are_counted(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.save_tokenizer(tmp_path))
    template = ChatTemplate(text=THINKING)
    for answer, thought in (("<think>so</think>yes", "<think>so</think>"), ("yes", ""), ("<think>so", "<think>so")):
        stream = AnswerStream(tokenizer, answer_format(tokenizer, template), [])
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        for token in ids:
            stream.push(token)
        stream.end()
        expected = len(tokenizer(thought, add_special_tokens=False)["input_ids"])
        assert stream.reasoning_tokens == expected


def test_a_style_is_told_by_its_template() -> None:
    found = [
        call_style(each, True)
        for each in (
            HERMES,
            XML,
            ARG_KEYS,
            MISTRAL,
            MISTRAL_ARGS,
            LLAMA,
            GRANITE,
            DEEPSEEK,
            DEEPSEEK_FENCED,
            HARMONY,
        )
    ]
    assert len({style.marks for style in found}) == len(found)
    assert call_style("no tools here", False) is GENERAL
    assert response_template("a template that says nothing of this", None) is None


def forms() -> list[tuple[str, CallStyle]]:
    named = (HERMES, MISTRAL, MISTRAL_ARGS, LLAMA, GRANITE, DEEPSEEK, DEEPSEEK_FENCED, HARMONY)
    return [(each, call_style(each, True)) for each in named]


@pytest.mark.parametrize(("chat_template", "style"), forms())
def test_a_form_is_read_back(chat_template: str, style: CallStyle) -> None:
    """What a call is forced into is what is read as one."""
    form = style.form
    assert form is not None
    call = form.text("get_weather", TEXT_ARGUMENTS)
    for count in (1, 2) if form.separator is not None else (1,):
        answer = form.start + (form.separator or "").join([call] * count) + form.end
        for pieces in cuts(answer):
            (text, _, calls), _ = read(chat_template, pieces)
            assert text == ""
            assert [(name, json.loads(arguments)) for _, name, arguments in calls] == [
                ("get_weather", ARGUMENTS)
            ] * count


#: The length of hostile answers, and the seconds of CPU time in which one has to be read: a bound on a hang.
LONG, PATIENCE = 200_000, 30.0

#: The beginning of an answer, and what it then repeats.
HOSTILE = {
    "white space": ("", " "),
    "calls that are not closed": ("", "<tool_call>"),
    "a name without an end": ('<tool_call>{"name": "', "a"),
    "a key after white space": ('<tool_call>{"name"', "\n"),
    "a bare call's white space": ("{", " "),
    "a name after white space": ("<tool_call>", " "),
    "parameters that are not closed": ("<tool_call><function=get_weather>", "<parameter=a>"),
    "arguments without a value": ("<tool_call>get_weather", "<arg_key>"),
    "white space in an argument": ("<tool_call>get_weather<arg_key>", " "),
    "values that are not closed": ("<tool_call>get_weather", "<arg_key>a</arg_key><arg_value>"),
    "channels": ("", " to=functions.a"),
    "a channel without an end": (" to=functions.", "a"),
}

#: What ends them: in the middle of something, closed, or by what does not fit.
ENDS = ("", "</function></tool_call>", "</arg_key></tool_call>", "{x")


@pytest.mark.parametrize("name", HOSTILE)
def test_no_answer_keeps_its_reader_busy(name: str) -> None:
    """While an answer is read no other goes on, so the time must not grow with the square of its length."""
    begin, repeated = HOSTILE[name]
    for chat_template in (HERMES, XML, ARG_KEYS, MISTRAL_ARGS, LLAMA, DEEPSEEK, HARMONY):
        for end in ENDS:
            answer = begin + repeated * (LONG // len(repeated)) + end + "x"
            began = time.thread_time()
            read(chat_template, [answer[at : at + 1000] for at in range(0, len(answer), 1000)])
            assert time.thread_time() - began < PATIENCE, (chat_template, end)


def test_the_form_of_a_tokenizer_s_own_template() -> None:
    calls = {"open": "<call>", "close": "</call>", "content": "json", "transform": {"function": "{content}"}}
    form = form_of(calls)
    assert form is not None
    assert form.text("f", "{}") == '<call>{"name": "f", "arguments": {}}</call>'
    keyed = {**calls, "transform": {"name": "{content.tool}", "arguments": "{content.input}"}}
    form = form_of(keyed)
    assert form is not None
    assert form.text("f", "{}") == '<call>{"tool": "f", "input": {}}</call>'
    assert form_of({**calls, "content": "xml-inline"}) is None

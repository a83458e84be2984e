"""Constraints: what a grammar allows and forces, what is refused by name, and that nothing hostile stops it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoTokenizer

from grammar_walk import ConstraintProcessor, walk
from split_common.errors import Busy, ConfigError, UnsupportedFeature
from split_device.generation import compilers, grammar
from split_device.generation.constraint import GrammarConstraint, Grammars
from split_device.generation.grammar import grammar_of
from split_device.generation.structured import MAX_SOURCE, StructuredOutputs
from split_device.generation.tagged import Tag, tagged
from tiny import VOCABULARY, save_tokenizer
from wiretap import LATE, wait_until

CUSTOMER = {
    "type": "object",
    "properties": {
        "customer_identification": {"type": "integer", "minimum": 10, "maximum": 99},
        "contact": {"enum": ["mail", "telephone"]},
    },
    "required": ["customer_identification", "contact"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, VOCABULARY, {tokenizer.eos_token_id})


@pytest.fixture(scope="module")
def start(grammars: Grammars) -> Callable[..., GrammarConstraint]:
    return lambda **fields: grammars.constraint(StructuredOutputs(**fields))


def allows(constraint: GrammarConstraint, tokenizer: Any, text: str) -> bool:
    """Whether the constraint allows the text and its end."""
    for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]:
        if not constraint.mask()[token]:
            return False
        constraint.accept(token)
    return constraint.finished


SCHEMAS: dict[str, Any] = {
    "an object": CUSTOMER,
    "formats": {"type": "string", "format": "date"},
    "a pattern and a length": {"type": "string", "pattern": "^[a-c]+$", "minLength": 2, "maxLength": 5},
    "numbers": {"type": "integer", "multipleOf": 5, "minimum": 10, "exclusiveMaximum": 55},
    "arrays": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    "tuples": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"const": "x"}],
        "items": False,
        "minItems": 2,
    },
    "maps": {"type": "object", "patternProperties": {"^k": {"type": "null"}}, "additionalProperties": False},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    "one of": {"oneOf": [{"type": "integer"}, {"type": "boolean"}]},
    "recursion": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
    },
    "neutral keywords": {"type": "array", "items": {"const": 1}, "uniqueItems": False, "maxItems": 2, "title": "t"},
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_what_a_schema_allows_is_valid(schema: Any, start: Any, tokenizer: Any) -> None:
    texts = [text for seed in range(5) if (text := walk(start(json=schema), tokenizer, seed)) is not None]
    assert texts
    for text in texts:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


def test_expressions_choices_and_grammars(start: Any, tokenizer: Any) -> None:
    assert allows(start(regex="[a-c]+(-[0-9]{2})?"), tokenizer, "abc-12")
    assert not allows(start(regex="[a-c]+(-[0-9]{2})?"), tokenizer, "abc-1")
    assert allows(start(choice=("yes", 'no "thanks"')), tokenizer, 'no "thanks"')
    assert not allows(start(choice=("yes", "no")), tokenizer, "nope")
    assert allows(start(grammar='start: "a" start "b" | "."'), tokenizer, "aa.bb")
    assert not allows(start(grammar='root ::= "a" [0-9]+'), tokenizer, "a")
    assert allows(start(grammar='root ::= "a" [0-9]+'), tokenizer, "a42")
    assert allows(start(json_object=True), tokenizer, '{"a":[1,{}]}')
    assert not allows(start(json_object=True), tokenizer, "[1]")
    assert allows(start(json=True), tokenizer, "[1]")


def test_whitespace_of_json_is_bounded(start: Any, tokenizer: Any) -> None:
    for text in ('{\n  "a": [1, 2],\n  "b": {}\n}', '{ "a" : 1 }', '{"a":1}', "{\n" + " " * 20 + '"a":1}'):
        assert allows(start(json_object=True), tokenizer, text), text
    for text in ('{  "a":1}', '{\n\n"a":1}', "{\n" + " " * 21 + '"a":1}', '{"a":1,\t"b":2}', '{"a":1} '):
        assert not allows(start(json_object=True), tokenizer, text), text


def test_what_is_forced_is_all_that_may_come(start: Any, tokenizer: Any) -> None:
    constraint, text = start(json=CUSTOMER), ""
    for token in tokenizer('{"', add_special_tokens=False)["input_ids"]:
        # White space may come first, before the key and the sign that begins it.
        constraint.accept(token)
    while (token := constraint.forced()) is not None:
        assert constraint.mask().nonzero()[:, 0].tolist() == [token]
        constraint.accept(token)
        text += tokenizer.decode([token])
    assert text == 'customer_identification"'
    assert constraint.mask().sum() > 1


def test_a_complete_grammar_forces_the_end_and_nothing_may_follow(start: Any, tokenizer: Any) -> None:
    constraint = start(choice=("a",))
    token = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    with pytest.raises(ConfigError, match="does not fit"):
        start(choice=("a",)).accept(tokenizer.eos_token_id)
    constraint.accept(token)
    assert constraint.forced() == tokenizer.eos_token_id
    constraint.accept(tokenizer.eos_token_id)
    assert constraint.finished
    with pytest.raises(ConfigError, match="does not fit"):
        constraint.accept(token)


def test_special_tokens_are_not_text(start: Any, tokenizer: Any) -> None:
    constraint = start(json={"const": "a</s>b"})
    text = []
    while (token := constraint.forced()) != tokenizer.eos_token_id:
        assert token is not None
        text.append(token)
        constraint.accept(token)
    assert tokenizer.decode(text, skip_special_tokens=True) == '"a</s>b"'


def test_answers_do_not_disturb_each_other(start: Any, tokenizer: Any) -> None:
    first, second = start(regex="[ab]{2}c"), start(regex="[ab]{2}c")
    for token in tokenizer("ab", add_special_tokens=False)["input_ids"]:
        first.accept(token)
    assert first.forced() is not None
    assert second.forced() is None


def test_a_processor_of_generate_follows_the_tokens(start: Any, tokenizer: Any) -> None:
    prompt = tokenizer("what", add_special_tokens=False, return_tensors="pt")["input_ids"]
    processor = ConstraintProcessor(start(choice=("ab", "cd")), prompt.shape[1])
    scores = processor(prompt, torch.zeros(1, VOCABULARY))
    assert tokenizer.decode(scores[0].isfinite().nonzero()[:, 0]) == "ac"
    token = tokenizer("c", add_special_tokens=False, return_tensors="pt")["input_ids"]
    scores = processor(torch.cat([prompt, token], 1), torch.full((1, VOCABULARY), -torch.inf))
    assert tokenizer.decode(scores[0].isfinite().nonzero()[:, 0]) == "d"


# --- what is refused ---------------------------------------------------------------------------------------

UNSUPPORTED: dict[str, Any] = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "not": {"not": {"type": "integer"}},
    "if": {"if": {"type": "integer"}, "then": {"minimum": 3}},
    "format idn-email": {"type": "string", "format": "idn-email"},
    "oneOf": {"oneOf": [{"type": "integer"}, {"minimum": 2}]},
    "look-around": {"type": "string", "pattern": "^(?!a)b"},
    "$dynamicRef": {"properties": {"a": {"$dynamicRef": "#x"}}},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_keyword_that_cannot_be_enforced_is_named(name: str) -> None:
    with pytest.raises(UnsupportedFeature, match=re.escape(name)):
        grammar_of(StructuredOutputs(json=UNSUPPORTED[name]))


WRONG: dict[str, StructuredOutputs] = {
    "exclusiveMinimum": StructuredOutputs(json={"exclusiveMinimum": True}),
    "minimum (5)": StructuredOutputs(json={"type": "integer", "minimum": 5, "maximum": 3}),
    "integr": StructuredOutputs(json={"type": "integr"}),
    "no text fits": StructuredOutputs(json={"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    "example.com": StructuredOutputs(json={"$ref": "http://example.com/x"}),
    "exactly one of": StructuredOutputs(regex="a", choice=("b",)),
    "choice is empty": StructuredOutputs(choice=()),
    "not none": StructuredOutputs(),
    "Expected ')'": StructuredOutputs(grammar="root ::= ("),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(name)):
        grammar_of(WRONG[name])


def _nested(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


#: Schemas and grammars that overflow the compiler's stack, or keep it busy for long.
HOSTILE: dict[str, Callable[[], StructuredOutputs]] = {
    "many optional properties": lambda: StructuredOutputs(
        json={"type": "object", "properties": {f"p{number}": {} for number in range(4000)}}
    ),
    "deep nesting": lambda: StructuredOutputs(json=_nested(400)),
    "a long chain of rules": lambda: StructuredOutputs(
        grammar="start: r0\n"
        + "".join(f"r{each}: r{each + 1} r{each + 1}\n" for each in range(4000))
        + 'r4000: "a"'
    ),
    "a large multiple": lambda: StructuredOutputs(json={"type": "integer", "multipleOf": 9999991}),
    "ten megabytes": lambda: StructuredOutputs(json={"const": "a" * 10_000_000}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"takes longer|too large|larger than|nested|recursion"):
        grammar_of(HOSTILE[name]())


def test_a_thousand_choices(start: Any, tokenizer: Any) -> None:
    assert allows(start(choice=tuple(f"choice {number}" for number in range(1000))), tokenizer, "choice 999")


def test_others_are_compiled_beside_one_that_takes_long(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A compiler that is stuck until a file is there."""
    begun, gate, script = (tmp_path / name for name in ("begun", "gate", "stuck.py"))
    script.write_text(
        f"import pathlib, runpy, time\npathlib.Path({str(begun)!r}).touch()\n"
        f"while not pathlib.Path({str(gate)!r}).exists():\n    time.sleep(0.01)\n"
        f"runpy.run_path({str(compilers.CHECK)!r}, run_name='__main__')\n"
    )
    with monkeypatch.context() as patched:
        patched.setattr(compilers, "CHECK", script)
        slow = grammars.compile(StructuredOutputs(regex="slow"))
        while not begun.exists():
            time.sleep(0.01)
    assert grammars.compile(StructuredOutputs(regex="quick")).result(60)
    assert not slow.done()
    assert grammars.compile(StructuredOutputs(regex="slow")) is slow
    gate.touch()
    assert slow.result(60)


def test_a_busy_machine_is_not_remembered(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    structured = StructuredOutputs(regex="later")
    with monkeypatch.context() as patched:
        patched.setattr(grammar, "STUCK_SECONDS", 0.0)
        with pytest.raises(Busy):
            grammars.compile(structured).result(60)
    wait_until(lambda: structured.source() not in grammars._kept)
    assert grammars.compile(structured).result(60)


def test_the_process_that_compiles_is_there_before_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    start = compilers._start
    monkeypatch.setattr(compilers, "_start", lambda: started.append(start()) or started[-1])
    request = json.dumps({"kind": "regex", "text": "a", "seconds": 5}).encode()
    with contextlib.closing(compilers.Compilers()) as own:
        own.prepare()
        own.prepare()
        assert len(started) == 1
        # Ctrl-C does not reach it.
        assert os.getpgid(started[0].pid) != os.getpgid(0)
        code, answer = own.run(request, LATE)
        # The next one was started after this one had answered.
        assert (code, started[0].poll(), started[1].poll(), len(started)) == (0, 0, None, 2)
        started[1].kill()
        started[1].wait()
        assert own.run(request, LATE) == (0, answer)
        assert len(started) == 4
        started[3].stdin.close()
        assert started[3].wait(LATE) == 1


def test_the_largest_source_is_bounded() -> None:
    StructuredOutputs(regex="a" * MAX_SOURCE).source()
    with pytest.raises(ConfigError, match="regex is larger than"):
        StructuredOutputs(regex="é" * (MAX_SOURCE // 2 + 1)).source()


# --- JSON between fixed texts ------------------------------------------------------------------------------

WEATHER = Tag(
    begin='<call>{"name": "weather", "arguments": ',
    schema={
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    end="}</call>",
)
TIME = Tag(begin="<call>time", end="</call>")
CALL = '<call>{"name": "weather", "arguments": {"city": "Paris"}}</call>'


def test_one_of_some_tags(grammars: Grammars, tokenizer: Any) -> None:
    both = tagged([WEATHER, TIME])
    assert allows(grammars.constraint(both), tokenizer, CALL)
    assert allows(grammars.constraint(both), tokenizer, "<call>time</call>")
    for wrong in ("", "a" + CALL, CALL + CALL, CALL.replace("city", "town")):
        assert not allows(grammars.constraint(both), tokenizer, wrong)


def test_several_tags(grammars: Grammars, tokenizer: Any) -> None:
    several = tagged([WEATHER, TIME], several=True, before="[", separator=", ", after="]")
    assert allows(grammars.constraint(several), tokenizer, f"[{CALL}, <call>time</call>]")
    assert not allows(grammars.constraint(several), tokenizer, f"[{CALL}{CALL}]")


def test_a_tag_after_a_trigger(grammars: Grammars, tokenizer: Any) -> None:
    after = tagged([Tag(begin=WEATHER.begin[6:], schema=WEATHER.schema, end=WEATHER.end)], trigger="<call>")
    for text in ("no call", "", f"well: {CALL} and {CALL}"):
        assert allows(grammars.constraint(after), tokenizer, text)
    assert not allows(grammars.constraint(after), tokenizer, "well: <call>time</call>")


def test_fixed_texts_of_special_tokens(grammars: Grammars, tokenizer: Any) -> None:
    constraint = grammars.constraint(
        tagged([Tag(begin="a<s>b", schema=True)], special={"<s>": tokenizer.bos_token_id})
    )
    tokens = []
    while (token := constraint.forced()) is not None:
        constraint.accept(token)
        tokens.append(token)
    assert tokens == tokenizer("a<s>b", add_special_tokens=False)["input_ids"]
    assert tokenizer.bos_token_id in tokens

"""Requests that shall keep a server busy, beside answers under way: refused or answered, and none stalls others."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil  # type: ignore[import-untyped]
import pytest
from transformers import AutoTokenizer

from serving import KEY, Unsplit, serving
from split_common.errors import PromptTooLong
from split_device.generation.tokenizing import encode_text

#: Seconds that something may take on a busy machine: a bound on a hang.
PATIENCE = 300.0

CHAT, TEXT, TOKENIZE = "/chat/completions", "/completions", "/tokenize"
HELLO = [{"role": "user", "content": "Hello"}]

#: What a path calls its limit of tokens, if not `max_tokens`.
LIMITS = {"/responses": "max_output_tokens"}

#: What the answers beside it say.
ASKED = {"model": "tiny", "prompt": "Once", "max_tokens": 40, "temperature": 0, "ignore_eos": True}


def schema(value: Any, **fields: Any) -> tuple[str, dict[str, Any]]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    return CHAT, {"messages": HELLO, "response_format": form, **fields}


def structured(**fields: Any) -> tuple[str, dict[str, Any]]:
    return TEXT, {"prompt": "Once", "structured_outputs": fields}


def tools(count: int, characters: int, **parameters: Any) -> tuple[str, dict[str, Any]]:
    described = {"description": "x" * characters, "parameters": {"type": "object", **parameters}}
    functions = [{"type": "function", "function": {"name": f"f{index}", **described}} for index in range(count)]
    return CHAT, {"messages": HELLO, "tools": functions, "tool_choice": "required"}


#: Each definition is the one before it, twice.
DOUBLED = {
    f"d{level}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{level - 1}"}] * 2} for level in range(1, 40)
}
DEEP = functools.reduce(lambda inner, _: {"type": "object", "properties": {"a": inner}}, range(300), {})
NAMES = {f"property_{index}": {"type": "string", "maxLength": 5000} for index in range(2000)}

HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "definitions that double": schema({"$defs": {**DOUBLED, "d0": {"type": "null"}}, "$ref": "#/$defs/d39"}),
    "conditions that multiply": schema({"allOf": [{"anyOf": [{"minimum": a}, {"maximum": a}]} for a in range(24)]}),
    "a schema that is itself": schema({"$ref": "#"}),
    "a deep schema": schema(DEEP),
    "many properties": schema({"type": "object", "properties": NAMES, "additionalProperties": False}),
    "a long array": schema({"type": "array", "items": {"type": "array", "minItems": 10**6}, "minItems": 10**6}),
    "a long text": schema({"type": "string", "minLength": 10**9}),
    "patterns that backtrack": schema({"type": "string", "pattern": "^(a+)+(a|aa)+(a|a?)+$", "maxLength": 10**6}),
    "many values": schema({"enum": [f"value {index}" for index in range(50_000)]}),
    "an expression that backtracks": structured(regex="(a+)+(a|aa)+(a|a?)+b"),
    "an expression with many states": structured(regex="[ab]*a[ab]{2000}"),
    "repetitions of repetitions": structured(regex="(((a{0,999}){0,999}){0,999}){0,999}"),
    "a look behind": structured(regex="(?<=a+)b\\1"),
    "a grammar that is ambiguous": structured(grammar='start: start start start | "a" | ""'),
    "a grammar that goes round": structured(grammar="start: a\na: b\nb: a"),
    "many choices": structured(choice=[f"{index} " * 20 for index in range(20_000)]),
    "long tools": tools(8, 480 * 1024),
    "too long tools": tools(10, 1024**2),
    "many tools": tools(512, 10, properties={f"p{index}": {"type": "integer"} for index in range(40)}),
    "a thousand answers": (CHAT, {"messages": HELLO, "n": 1000}),
    "many answers": (TEXT, {"prompt": "Once", "n": 128, "max_tokens": 20}),
    "many prompts": (TEXT, {"prompt": ["a"] * 200_000}),
    "a long prompt": (TEXT, {"prompt": "word " * 700_000}),
    "many messages": (CHAT, {"messages": HELLO * 60_000}),
    "many items": ("/responses", {"input": HELLO * 60_000}),
    "many messages of Anthropic's": ("/messages", {"messages": HELLO * 60_000}),
    "many messages to tokenize": (TOKENIZE, {"messages": HELLO * 60_000}),
    "a long text to tokenize": (TOKENIZE, {"prompt": "word " * 100_000, "return_token_strs": True}),
    "many biases": (TEXT, {"prompt": "Once", "logit_bias": {str(token): 1 for token in range(100_000)}}),
    "many words": (TEXT, {"prompt": "Once", "bad_words": ["word " * 30] * 1024}),
}


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    with serving(checkpoint) as (url, _):
        yield url


class Beside:
    """Answers that are streamed one after the other until it is left."""

    def __init__(self, url: str, expected: str) -> None:
        self._url, self._expected = url, expected
        (self._server,) = [
            child for child in psutil.Process().children(recursive=True) if "serve" in child.cmdline()
        ]
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers = 0
        #: The longest time between two pieces, in seconds.
        self.gap = 0.0
        #: The most CPU time of the server between two pieces, in seconds, which does not depend on other processes.
        self.cpu_gap = 0.0
        self.wrong: list[str] = []

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._thread.join(PATIENCE)

    def _spent(self) -> float:
        times = self._server.cpu_times()
        return float(times.user + times.system)

    def _run(self) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        while not self._leaving.is_set():
            text, last, spent = "", time.monotonic(), self._spent()
            body = {**ASKED, "stream": True}
            with httpx2.stream(
                "POST", f"{self._url}{TEXT}", json=body, headers=headers, timeout=PATIENCE
            ) as answer:
                for line in answer.iter_lines():
                    now = time.monotonic()
                    self.gap, last = max(self.gap, now - last), now
                    before, spent = spent, self._spent()
                    self.cpu_gap = max(self.cpu_gap, spent - before)
                    if line.startswith("data: {"):
                        text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            self.answers += 1
            if text != self._expected:
                self.wrong.append(text)


@pytest.mark.long
def test_none_stalls_the_others(url: str, checkpoint: Path) -> None:
    expected = Unsplit(checkpoint).say("Once", 40, eos=False)
    headers = {"Authorization": f"Bearer {KEY}"}
    with Beside(url, expected) as beside, httpx2.Client(base_url=url, headers=headers, timeout=PATIENCE) as client:
        for name, (path, fields) in HOSTILE.items():
            began = time.monotonic()
            limits = {LIMITS.get(path, "max_tokens"): 8, "temperature": 0} if path != TOKENIZE else {}
            address = path if path != TOKENIZE else url.replace("/v1", path)
            answer = client.post(address, json={"model": "tiny", **limits, **fields})
            print(f"{name}: {answer.status_code} after {time.monotonic() - began:.2f} s: {answer.text[:150]}")
            assert answer.status_code in (200, 400, 413), (name, answer.text)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"], name
        nested = "[" * 100_000
        answer = client.post(CHAT, content=f'{{"model": "tiny", "messages": {nested}', timeout=PATIENCE)
        assert answer.status_code == 400
    gaps = f"{beside.gap:.2f} s, {beside.cpu_gap:.2f} s of CPU time"
    print(f"{beside.answers} answers beside it, the longest gap {gaps}")
    assert beside.answers
    assert not beside.wrong
    assert beside.gap < PATIENCE / 3


def test_what_is_far_too_long_is_refused_without_encoding_all_of_it(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    seen: list[int] = []

    class Watched:
        def __call__(self, text: str, **options: Any) -> Any:
            seen.append(len(text))
            return tokenizer(text, **options)

    text = "word " * 100_000
    with pytest.raises(PromptTooLong, match="more than 256 tokens leave no room"):
        encode_text(Watched(), text, 256)
    assert sum(seen) < len(text) / 50
    fits = " " * 50_000
    assert encode_text(Watched(), fits, 10**5).shape == encode_text(tokenizer, fits).shape

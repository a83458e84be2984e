"""What requests cost that ask for much: counted, so that no test depends on how fast the machine is."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from starlette.requests import Request as HttpRequest
from transformers import AutoTokenizer

import tiny
from split_common.errors import ConfigError, PromptTooLong
from split_common.system.process import leave_out_of_collections
from split_common.system.text import json_line
from split_device.generation import checking, constraint, turn_time
from split_device.generation.active_requests import ActiveRequests
from split_device.generation.admission import Admission
from split_device.generation.answers import AnswerStream
from split_device.generation.constraint import Grammars
from split_device.generation.generator import Generator
from split_device.generation.request import Generation, Request
from split_device.generation.settings import MAX_BAD_WORDS, MAX_ENTRIES, MAX_STOP, Sampling, check_stop
from split_device.generation.structured import StructuredOutputs
from split_device.generation.time_limit import within
from split_device.generation.token_logprobs import TokenLogprobs
from split_device.jobs.job import ModelChoice, Task
from split_device.serving.answering import Answer
from split_device.serving.choices import Choice
from split_device.serving.fields import ApiError
from split_device.serving.http import PIECE, json_pieces
from split_device.serving.openai.responses.endpoint import EVENT_DEPTH, Responses
from split_device.serving.text_model import TextModel
from split_device.serving.tokens import Tokens
from wiretap import LATE


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


class Counted:
    """Counts the calls of an object's methods, by their names."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        self.calls[name] = self.calls.get(name, 0) + 1
        return getattr(self._inner, name)


def test_a_long_text_that_is_forced_is_looked_for_once(tokenizer: Any) -> None:
    grammars = Grammars(tokenizer, tiny.VOCABULARY, {tokenizer.eos_token_id})
    text = "made of many words " * 20
    walked = grammars.constraint(StructuredOutputs(choice=(text,)))
    counted: Any = Counted(walked._matcher)
    walked._matcher = counted
    tokens = []
    while not walked.finished:
        token = walked.forced()
        assert token is not None
        tokens.append(token)
        walked.accept(token)
    assert tokens == [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert counted.calls["consume_token"] == len(text)
    assert counted.calls["compute_ff_tokens"] <= 2


def test_what_grammars_need_is_made_once_and_ahead(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = constraint.grammar_tokenizer

    def noted(*given: Any) -> Any:
        made.append(1)
        return make(*given)

    monkeypatch.setattr(constraint, "grammar_tokenizer", noted)
    grammars = Grammars(tokenizer, tiny.VOCABULARY, {tokenizer.eos_token_id})
    grammars.prepare().result(LATE)
    assert made == [1]
    for choice in ("a", "b"):
        assert grammars.constraint(StructuredOutputs(choice=(choice,))).forced() is not None
    assert made == [1]


def test_many_slow_grammars_leave_others_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long each takes, a turn looks at one, and those behind it come first in the next."""
    monkeypatch.setattr(turn_time, "TURN_SECONDS", 0.0)
    looked: list[int] = []

    def ready(number: int, constrained: bool) -> Any:
        def prepare() -> bool:
            looked.append(number)
            return constrained

        request = SimpleNamespace(constraint=object() if constrained else None)
        return (
            SimpleNamespace(
                number=number,
                generation=SimpleNamespace(request=request),
                sampler=SimpleNamespace(prepare=prepare),
            ),
            torch.zeros(1, 1),
        )

    def numbers(found: Any) -> list[int]:
        return [request.number for request, _ in found]

    first, waiting = checking.prepare([ready(number, number < 3) for number in range(5)])
    assert (numbers(first), numbers(waiting)) == ([0, 3, 4], [1, 2])
    second, waiting = checking.prepare([*waiting, ready(5, False), ready(0, True)])
    assert (numbers(second), numbers(waiting)) == ([1, 5], [2, 0])
    assert looked == [0, 3, 4, 1, 5]


def test_many_choices_leave_places_to_other_requests() -> None:
    """However many wait: other requests that came later begin, and no choice is passed over for good."""
    stage: Any = SimpleNamespace(cost=lambda _tokens: 0, unreserved=0)
    admission = Admission(stage, stage, 16)
    runs: dict[Any, Any] = {}
    active: Any = SimpleNamespace(_admission=admission, by_generation=runs)

    def add(index: int) -> Any:
        generation = Generation(Request([5], priority=1, index=index), None, lambda _: None)
        sampler: Any = SimpleNamespace(max_length=8)
        admission.add(generation, sampler)
        return generation

    def begin() -> list[Any]:
        begun = []
        while (admitted := ActiveRequests.admit(active, 0.0)) is not None:
            runs[admitted.generation] = SimpleNamespace(session=SimpleNamespace(waits_for_room=False))
            begun.append(admitted.generation)
        return begun

    choices = [add(index) for index in range(128)]
    others = [add(0) for _ in range(5)]
    assert begin() == [*choices[:15], others[0]]
    del runs[choices[3]], runs[others[0]]
    assert begin() == [choices[15], others[1]]
    for ended in choices[4:8]:
        del runs[ended]
    assert begin() == choices[16:20]
    del runs[choices[0]]
    assert begin() == [others[2]]


def test_many_requests_that_begin_leave_others_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long each takes, one begins in a turn, and the next turn comes at once."""
    monkeypatch.setattr(turn_time, "TURN_SECONDS", 0.0)
    waiting, begun, calls = [*range(5)], list[int](), list[object]()
    requests = SimpleNamespace(admit=lambda _now: waiting.pop(0) if waiting else None)
    requests.admit_all = partial(ActiveRequests.admit_all, requests)  # type: ignore[arg-type]
    generator: Any = SimpleNamespace(
        _requests=requests, _now=0.0, _begin=begun.append, _inbox=SimpleNamespace(put=calls.append)
    )
    for turn in range(5):
        Generator._admit(generator)
        assert (begun, len(calls)) == ([*range(turn + 1)], turn + 1)
    Generator._admit(generator)
    assert len(calls) == 5


def test_lists_that_cost_time_at_every_token_have_an_end() -> None:
    assert check_stop(["a"] * MAX_ENTRIES) == ("a",) * MAX_ENTRIES
    assert check_stop(["a" * MAX_STOP]) == ("a" * MAX_STOP,)
    with pytest.raises(ConfigError, match="stop has 65,540 characters: at most 65,536 are taken"):
        check_stop(["text " * 13107, "texts"])
    with pytest.raises(ConfigError, match="stop_sequences has 1025 entries: at most 1024 are taken"):
        check_stop(["a"] * (MAX_ENTRIES + 1), "stop_sequences")
    assert Sampling(bad_words=("a" * MAX_BAD_WORDS,)).checked().bad_words
    with pytest.raises(ConfigError, match="bad_words have 65,540 characters: at most 65,536 are taken"):
        Sampling(bad_words=("word " * 13107, "words")).checked()


def test_what_is_there_is_left_out_of_collections() -> None:
    """What a server has loaded is not looked through again, however many objects a request makes."""
    kept = [[index] for index in range(50_000)]
    try:
        leave_out_of_collections()
        assert len(gc.get_objects()) < len(kept) / 10
    finally:
        gc.unfreeze()


class Watched:
    """A model that is loaded, and notes on which threads it works."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.model = SimpleNamespace(split_parts=SimpleNamespace(adapters=SimpleNamespace(names=[])))
        self.generator = self
        self.grammars = self
        self.prepared = 0
        self.threads: list[int] = []

    def prepare(self) -> None:
        self.prepared += 1

    def structured(self, _task: Task) -> None:
        self.threads.append(threading.get_ident())

    def encode(self, _task: Task) -> list[int]:
        return [5, 17]

    def answer(self, _task: Task, prompt: list[int], _name: str | None) -> AnswerStream:
        self.threads.append(threading.get_ident())
        return AnswerStream(self.tokenizer, None, prompt)

    def request(self, _task: Task, *_: object) -> Any:
        self.threads.append(threading.get_ident())
        return Request([5, 17])

    def submit(self, *_: object) -> Any:
        self.threads.append(threading.get_ident())
        return SimpleNamespace(future=Future(), done=True)


def test_choices_begin_beside_the_event_loop(tokenizer: Any) -> None:
    """Fields with many entries, of many choices, are looked at while other requests go on."""
    loaded: Any = Watched(tokenizer)
    model = TextModel(loaded, ModelChoice(name="m"), "m")
    task = Task(model=ModelChoice(name="m"), prompt="Once")

    async def answer() -> None:
        begun: Any = None
        with Answer(begun) as choices:
            prompt = await model.encode(task)
            for index in range(3):
                await model.begin(choices, task, prompt, index=index)
            assert len(choices.streams) == 3

    asyncio.run(answer())
    assert loaded.prepared == 1
    assert len(loaded.threads) == 1 + 3 * 3
    assert threading.get_ident() not in loaded.threads


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("messages", {"role": "user", "content": [{"type": "text", "text": "a"}] * 257}),
        ("messages", {"role": "user", "content": [{"type": "tool_result", "content": [{"text": "a"}] * 257}]}),
        ("messages", {"role": "assistant", "tool_calls": [{}] * 257}),
        ("input", {"type": "function_call_output", "output": [{}] * 257}),
        ("system", {"type": "text", "text": "a"}),
    ],
)
def test_conversations_of_too_many_parts_are_refused_before_they_are_read(
    kind: str, message: dict[str, Any], tokenizer: Any
) -> None:
    loaded: Any = Watched(tokenizer)
    loaded.limit = 256
    model = TextModel(loaded, ModelChoice(name="m"), "m")
    parsed: list[object] = []

    def ask(*messages: Any) -> None:
        asyncio.run(model.parsed(_posted(json.dumps({kind: messages}).encode()), parsed.append))

    with pytest.raises(PromptTooLong, match=f"{kind} has 257 entries, more than the model's 256 positions"):
        ask(*[message] * (257 if kind == "system" else 1))
    assert not parsed
    ask({"role": "user", "content": [{"type": "text", "text": "a"}] * 256})
    ask(["not", "an", "object"], None, 3)
    assert len(parsed) == 2


def test_token_ids_are_looked_at_beside_the_event_loop(tokenizer: Any) -> None:
    threads: list[int] = []

    class Noting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __len__(self) -> int:
            threads.append(threading.get_ident())
            return len(tokenizer)

        def decode(self, tokens: list[int]) -> str:
            threads.append(threading.get_ident())
            return str(tokenizer.decode(tokens))

    loaded: Any = Watched(Noting())
    endpoint = Tokens(TextModel(loaded, ModelChoice(name="m"), "m"))
    answer = asyncio.run(endpoint.detokenize(_posted(b'{"tokens": [5, 17]}')))
    assert json.loads(bytes(answer.body)) == {"prompt": tokenizer.decode([5, 17])}
    with pytest.raises(ApiError, match=r"tokens\[1\]: 999999 is not one of"):
        asyncio.run(endpoint.detokenize(_posted(b'{"tokens": [5, 999999]}')))
    assert threads
    assert threading.get_ident() not in threads


def _posted(body: bytes) -> HttpRequest:
    async def receive() -> Any:
        return {"type": "http.request", "body": body}

    return HttpRequest({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)


def test_the_last_events_are_made_beside_the_event_loop(tokenizer: Any) -> None:
    """They repeat all log probabilities of the answer."""
    loaded: Any = Watched(tokenizer)
    model = TextModel(loaded, ModelChoice(name="m"), "m")
    threads: list[int] = []

    def noted(found: Any) -> Any:
        threads.append(threading.get_ident())
        return found

    writer: Any = SimpleNamespace(
        response=lambda *_: noted({"status": "completed"}),
        item=lambda _part, status: {} if status == "in_progress" else noted({}),
        item_id=lambda _part: "x",
        names=SimpleNamespace(custom=()),
    )

    async def pieces() -> AsyncIterator[tuple[int, Choice]]:
        yield 0, Choice("text", 1, "stop", [TokenLogprobs(5, "text", b"text", -1.0)])

    asked: Any = SimpleNamespace(body=SimpleNamespace(store=False))
    answer: Any = SimpleNamespace(pieces=pieces)

    async def told() -> list[str]:
        store: Any = None
        return [each async for each in Responses(model, store)._events(asked, answer, writer, 20)]

    events = asyncio.run(told())
    assert events[-1].startswith("event: response.completed\n")
    assert len(events) == 9
    first, *last = threads[1:]
    assert first == threads[0] == threading.get_ident()
    assert len(last) == 2
    assert threading.get_ident() not in last


def test_a_large_answer_is_written_in_small_pieces() -> None:
    token = {
        "token": "a\u2028",
        "logprob": -1.5,
        "bytes": [97],
        "top_logprobs": [{"token": "é", "logprob": -2}] * 20,
    }
    content = {
        "id": "x",
        "choices": [
            {"index": index, "message": {}, "logprobs": {"content": [token] * 500, "refusal": None}}
            for index in range(3)
        ],
        "prompt_logprobs": [None, {5: {"rank": 1}, "6": {"rank": 2}}],
        "tokens": [*range(3 * PIECE)],
        "empty": [[], {}, [[]], ""],
    }
    pieces = [*json_pieces(content)]
    assert "".join(pieces) == json_line(content)
    assert max(map(len, pieces)) < 10 * PIECE < len(json_line(content)) / 20
    part = {"type": "output_text", "logprobs": [token] * 1500}
    ended = {"type": "x", "response": {"output": [{"content": [part]}]}}
    pieces = [*json_pieces(ended, EVENT_DEPTH)]
    assert "".join(pieces) == json_line(ended)
    assert max(map(len, pieces)) < PIECE < len(json_line(ended)) / 20


def test_a_time_limit_that_ends_as_its_call_returns() -> None:
    """The time is over within the last instruction, after which there is nothing that it could end."""
    numbers = [0] * 5_000_000
    for _ in range(3):
        with pytest.raises(TimeoutError):
            within(0.001, lambda: None in numbers)

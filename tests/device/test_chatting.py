"""Answers one at a time, and conversations: streamed, drafted, and continued from turn to turn."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from fleet import joined, running_broker, split_model, start_worker
from split_common.errors import ConfigError, PromptTooLong, UnknownModel
from split_device.generation.generator import Generator
from split_device.generation.limits import ONE_ANSWER
from split_device.generation.settings import Sampling
from split_device.generation.tokenizing import encode_chat, encode_text, end_tokens, load_tokenizer
from split_device.jobs.chat import Conversation, answer
from split_device.jobs.job import Message, ModelChoice, Task
from split_device.jobs.models import Loaded
from split_worker.worker import Worker
from wiretap import LATE

CHOICE = ModelChoice(name="tiny")
GREEDY = Sampling(max_tokens=6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.save("llama", tmp_path_factory.mktemp("model") / "tiny")
    return tiny.save_tokenizer(directory)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return load_tokenizer(str(checkpoint))


@pytest.fixture(scope="module")
def loaded(transport: str, checkpoint: Path, tokenizer: Any) -> Iterator[Loaded]:
    with split_model(checkpoint) as model, Generator(model, limits=ONE_ANSWER) as generator:
        yield Loaded(model, tokenizer, generator)


@pytest.fixture(scope="module")
def unsplit(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def alone(model: Any, tokenizer: Any, ids: torch.Tensor, sampling: Sampling = GREEDY) -> str:
    """What the unsplit model says after a prompt."""
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=sampling.max_tokens,
        eos_token_id=sorted(end_tokens(model, tokenizer)),
        pad_token_id=0,
        **sampling.resolved(model.generation_config).options(),
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def talk_alone(model: Any, tokenizer: Any, *lines: str, sampling: Sampling = GREEDY) -> list[str]:
    """Its answers to a conversation, each computed from the beginning."""
    messages: list[dict[str, Any]] = []
    for line in lines:
        messages.append({"role": "user", "content": line})
        text = alone(model, tokenizer, encode_chat(tokenizer, messages), sampling)
        messages.append({"role": "assistant", "content": text})
    return [message["content"] for message in messages[1::2]]


def talk(loaded: Loaded, *lines: str, sampling: Sampling = GREEDY) -> list[str]:
    conversation = Conversation(loaded, CHOICE)
    return [conversation.say(line, sampling).text for line in lines]


def raw(text: str, sampling: Sampling = GREEDY, **fields: Any) -> Task:
    """A task to continue a text."""
    return Task(model=CHOICE, prompt=text, sampling=sampling, **fields)


LINES = ("Hello", "What else?", "And then")


def test_turns_are_those_of_the_unsplit_model(loaded: Loaded, unsplit: Any, tokenizer: Any) -> None:
    assert talk(loaded, *LINES) == talk_alone(unsplit, tokenizer, *LINES)


def test_drafts_change_no_turn(loaded: Loaded, unsplit: Any, tokenizer: Any) -> None:
    drawn = Sampling(max_tokens=24, temperature=0.7, top_k=5, seed=7)
    wanted = talk_alone(unsplit, tokenizer, *LINES, sampling=drawn)
    said = []
    for speculate in ("off", "auto", "suffix-recycle"):
        conversation = Conversation(loaded, CHOICE)
        answers = [conversation.say(line, dataclasses.replace(drawn, speculate=speculate)) for line in LINES]
        assert [each.text for each in answers] == wanted
        said.append(answers)
    assert [each.drafted_tokens for each in said[0]] == [0, 0, 0]
    assert all(0 < each.drafted_tokens >= each.accepted_tokens for each in said[2])


def test_a_seed_survives_the_worker(
    checkpoint: Path, unsplit: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker leaves in the middle of an answer, and another one goes on."""
    drawn = Sampling(max_tokens=24, temperature=0.7, top_k=5, seed=7, speculate="suffix-recycle")
    wanted = talk_alone(unsplit, tokenizer, *LINES, sampling=drawn)
    with running_broker() as broker, joined(broker.address, checkpoint) as (model, worker):
        workers = [worker, start_worker(checkpoint, broker.address, "2:-2")]
        try:
            with Generator(model, limits=ONE_ANSWER) as generator:
                conversation = Conversation(Loaded(model, tokenizer, generator), CHOICE)
                said = [conversation.say(LINES[0], drawn)]
                seen: list[str] = []
                begun = [held_after(each, monkeypatch, 4) for each in workers]

                def leave(text: str) -> None:
                    seen.append(text)
                    if len(seen) == 3:
                        for go_on in begun:
                            go_on.set()
                        for each in workers:
                            each.stop()
                        workers.append(start_worker(checkpoint, broker.address, "2:-2"))

                said += [conversation.say(LINES[1], drawn, leave), conversation.say(LINES[2], drawn)]
                assert [each.text for each in said] == wanted
                assert model.traffic["replays"] > 0
        finally:
            for each in workers:
                each.stop()


def held_after(worker: Worker, monkeypatch: pytest.MonkeyPatch, forwards: int) -> threading.Event:
    """Makes a worker wait after so many forwards, until the event that is returned is set."""
    go_on, launch, numbers = threading.Event(), worker._compute._launch, itertools.count()

    def wait_and_launch(batch: Any) -> Any:
        if next(numbers) >= forwards:
            go_on.wait(LATE)
        return launch(batch)

    monkeypatch.setattr(worker._compute, "_launch", wait_and_launch)
    return go_on


def test_a_turn_sends_only_what_is_new(loaded: Loaded) -> None:
    conversation = Conversation(loaded, CHOICE)
    first = conversation.say("Said nowhere else", GREEDY)
    second = conversation.say("More", GREEDY)
    # The last token of an answer never went through the model.
    assert second.cached_tokens == first.prompt_tokens + first.tokens - 1
    assert second.request_id == first.request_id


def test_the_cache_is_cut_back_to_where_a_prompt_departs(loaded: Loaded, unsplit: Any, tokenizer: Any) -> None:
    texts = ("a beginning of a text: abcdef", "a beginning of a text: abcxyz", "a beginning of", "zyx", "zyx")
    expected = [alone(unsplit, tokenizer, encode_text(tokenizer, text)) for text in texts]
    assert [answer(loaded, raw(text)).text for text in texts] == expected


def test_sliding_windows_that_cannot_be_cut_back(tmp_path: Path) -> None:
    """The device's own layers have dropped what is asked for again: it is computed again."""
    checkpoint = tiny.save_tokenizer(tiny.save("gemma3_text", tmp_path / "tiny"))
    tokenizer = load_tokenizer(str(checkpoint))
    unsplit = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    texts = ("a long text, so that it fills the window", "a long text, so that is new")
    with split_model(checkpoint) as split, Generator(split, limits=ONE_ANSWER) as generator:
        loaded = Loaded(split, tokenizer, generator)
        found = [answer(loaded, raw(text)).text for text in texts]
    assert found == [alone(unsplit, tokenizer, encode_text(tokenizer, text)) for text in texts]


def test_a_turn_that_fails_is_forgotten(loaded: Loaded, unsplit: Any, tokenizer: Any) -> None:
    conversation = Conversation(loaded, CHOICE)
    first = conversation.say("Hello", GREEDY).text
    with pytest.raises(PromptTooLong, match="256 positions"):
        conversation.say("x" * 250, GREEDY)
    assert [message.content for message in conversation.messages] == ["Hello", first]

    def break_off(_text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.say("More", GREEDY, break_off)
    assert len(conversation.messages) == 2
    assert [first, conversation.say("More", GREEDY).text] == talk_alone(unsplit, tokenizer, "Hello", "More")


def test_ctrl_c_anywhere_leaves_a_whole_turn_or_nothing(loaded: Loaded) -> None:
    """Before each line of `say` and of `answer` in turn."""
    lines: set[tuple[Any, int]] = set()
    interrupted = Conversation.say.__code__, answer.__code__

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if frame.f_code not in interrupted:
            return None
        if event == "line" and (place := (frame.f_code, frame.f_lineno)) not in lines:
            lines.add(place)
            raise KeyboardInterrupt
        return trace

    conversation, before = Conversation(loaded, CHOICE), sys.gettrace()
    for number in range(200):
        sys.settrace(trace)
        try:
            conversation.say(str(number), Sampling(max_tokens=1))
            break
        except KeyboardInterrupt:
            roles = [message.role for message in conversation.messages]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
        finally:
            sys.settrace(before)
    else:
        pytest.fail("it never came to the end")
    assert len(lines) > 20


def test_reset_keeps_the_system_message(loaded: Loaded) -> None:
    start = (Message("system", "Be terse."),)
    conversation = Conversation(loaded, CHOICE, start)
    one = conversation.say("Hello", GREEDY)
    assert conversation.say("Hello", GREEDY).prompt_tokens > one.prompt_tokens
    conversation.reset()
    assert conversation.messages == start
    assert conversation.say("Hello", GREEDY).text == one.text


def test_text_streams_as_it_comes(loaded: Loaded) -> None:
    pieces: list[str] = []
    tokens: list[int] = []
    said = answer(
        loaded, raw("Hello", Sampling(max_tokens=40)), None, pieces.append, on_token=lambda: tokens.append(1)
    )
    assert "".join(pieces) == said.text
    assert 1 < len(pieces) <= said.tokens == len(tokens)
    assert (said.prompt_tokens, said.tokens, said.finish_reason) == (5, 40, "length")
    assert 0 < said.first_token_seconds < said.seconds


def test_answers_end_with_the_model_or_its_positions(loaded: Loaded, tokenizer: Any) -> None:
    split, ids = loaded.model, encode_text(tokenizer, "Hello")
    free = split.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)[0, 5:]
    split.generation_config.eos_token_id = [int(free[3])]
    try:
        said = answer(loaded, raw("Hello"))
        assert (said.tokens, said.finish_reason) == (free.tolist().index(int(free[3])) + 1, "stop")
    finally:
        split.generation_config.eos_token_id = None
    full = answer(loaded, raw("Hello" * 50, Sampling(max_tokens=100)))
    assert (full.tokens, full.finish_reason) == (6, "length")


def test_a_stop_text_ends_an_answer(loaded: Loaded) -> None:
    whole = answer(loaded, raw("Hello", Sampling(max_tokens=40)))
    stop = whole.text[4:6]
    pieces: list[str] = []
    said = answer(loaded, raw("Hello", Sampling(max_tokens=40), stop=(stop,)), None, pieces.append)
    assert "".join(pieces) == said.text == whole.text[: whole.text.index(stop)]
    assert (said.finish_reason, said.tokens < whole.tokens) == ("stop", True)


def test_one_token_has_no_rate(loaded: Loaded) -> None:
    said = answer(loaded, raw("Hello", Sampling(max_tokens=1)))
    assert (said.tokens, said.tokens_per_second) == (1, 0.0)


def test_chat_templates(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hello"}]
    text = "system:Be terse.</s>user:Hello</s>assistant:"
    assert torch.equal(encode_chat(tokenizer, messages), encode_text(tokenizer, text))
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system messages') }}")
    with pytest.raises(ConfigError, match="refuses this conversation: no system messages"):
        encode_chat(tokenizer, messages)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert torch.equal(encode_chat(tokenizer, messages), encode_text(tokenizer, "Be terse.\nHello"))


def test_tokenizers_that_cannot_be_loaded(tmp_path: Path) -> None:
    checkpoint = tiny.save("llama", tmp_path / "bare")
    with pytest.raises(UnknownModel, match=r"has no tokenizer: put"):
        load_tokenizer(str(checkpoint))
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(UnknownModel, match="cannot be loaded"):
        load_tokenizer(str(checkpoint))
    with pytest.raises(UnknownModel):
        load_tokenizer(str(tmp_path / "nothing"))

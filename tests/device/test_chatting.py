"""Conversations: streamed answers, and a cache that is continued from turn to turn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from fleet import split_model
from split_common.errors import ConfigError, PromptTooLong, UnknownModel
from split_device.generation.chat import Conversation
from split_device.generation.settings import Sampling
from split_device.generation.tokenizing import encode_chat, encode_text, load_tokenizer

GREEDY = Sampling(max_tokens=6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.save("llama", tmp_path_factory.mktemp("model") / "tiny")
    return tiny.save_tokenizer(directory)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return load_tokenizer(str(checkpoint))


@pytest.fixture(scope="module")
def split(transport: str, checkpoint: Path) -> Iterator[Any]:
    with split_model(checkpoint) as model:
        yield model


@pytest.fixture
def unsplit(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def talk(model: Any, tokenizer: Any, *lines: str) -> list[str]:
    conversation = Conversation(model, tokenizer)
    return [conversation.say(line, GREEDY).text for line in lines]


def afresh(model: Any, tokenizer: Any, *lines: str) -> list[str]:
    """The same, and every turn is computed from its beginning."""
    conversation = Conversation(model, tokenizer)
    answers = []
    for line in lines:
        conversation.forget_cache()
        answers.append(conversation.say(line, GREEDY).text)
    return answers


def test_turns_are_those_of_the_unsplit_model(split: Any, unsplit: Any, tokenizer: Any) -> None:
    lines = ("Hello", "What else?", "And then")
    expected = afresh(unsplit, tokenizer, *lines)
    assert talk(split, tokenizer, *lines) == talk(unsplit, tokenizer, *lines) == expected


def test_a_turn_sends_only_what_is_new(split: Any, tokenizer: Any) -> None:
    lengths: list[int] = []
    stack = split.split_parts.stack.owner
    hook = stack.register_forward_pre_hook(
        lambda _module, _args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        conversation = Conversation(split, tokenizer)
        first = conversation.say("Hello", GREEDY)
        assert lengths == [first.prompt_tokens] + [1] * 5
        lengths.clear()
        second = conversation.say("More", GREEDY)
        # The last token of an answer never went through the model.
        cached = first.prompt_tokens + first.tokens - 1
        assert lengths == [second.prompt_tokens - cached] + [1] * 5
    finally:
        hook.remove()


def test_the_answer_streams_without_the_prompt(split: Any, tokenizer: Any) -> None:
    pieces: list[str] = []
    first: list[int] = []
    answer = Conversation(split, tokenizer).complete(
        encode_text(tokenizer, "Hello"), GREEDY, pieces.append, lambda: first.append(len(pieces))
    )
    assert "".join(pieces) == answer.text
    assert 1 < len(pieces) <= answer.tokens
    assert first == [0]
    assert 0 < answer.first_token_seconds < answer.seconds


def test_the_cache_is_cut_back_to_where_a_prompt_departs(split: Any, unsplit: Any, tokenizer: Any) -> None:
    prompts = [encode_text(tokenizer, text) for text in ("abcdef", "abcxyz", "abc", "zyx", "zyx")]
    conversation = Conversation(split, tokenizer)
    continued = [conversation.complete(ids, GREEDY).text for ids in prompts]
    assert continued == [Conversation(unsplit, tokenizer).complete(ids, GREEDY).text for ids in prompts]


def test_sliding_windows_that_cannot_be_cut_back(tmp_path: Path) -> None:
    """The device's own layers have dropped what is asked for again: the conversation is sent again."""
    checkpoint = tiny.save_tokenizer(tiny.save("gemma3_text", tmp_path / "tiny"))
    tokenizer = load_tokenizer(str(checkpoint))
    unsplit = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    prompts = [
        encode_text(tokenizer, text) for text in ("a long text, so that it fills the window", "a long night")
    ]
    with split_model(checkpoint) as split:
        conversation = Conversation(split, tokenizer)
        continued = [conversation.complete(ids, GREEDY).text for ids in prompts]
        assert continued == [Conversation(unsplit, tokenizer).complete(ids, GREEDY).text for ids in prompts]


def test_a_turn_that_fails_is_undone(split: Any, unsplit: Any, tokenizer: Any) -> None:
    conversation = Conversation(split, tokenizer)
    first = conversation.say("Hello", GREEDY).text
    with pytest.raises(PromptTooLong, match="256 positions"):
        conversation.say("x" * 250, GREEDY)
    assert [message["content"] for message in conversation.messages] == ["Hello", first]

    def break_off(_text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.say("More", GREEDY, break_off)
    assert len(conversation.messages) == 2
    assert [first, conversation.say("More", GREEDY).text] == talk(unsplit, tokenizer, "Hello", "More")


def test_ctrl_c_anywhere_leaves_a_whole_turn_or_nothing(unsplit: Any, tokenizer: Any) -> None:
    """Before each line of `say` in turn."""
    lines: set[int] = set()

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if frame.f_code is not Conversation.say.__code__:
            return None
        if event == "line" and frame.f_lineno not in lines:
            lines.add(frame.f_lineno)
            raise KeyboardInterrupt
        return trace

    conversation, before = Conversation(unsplit, tokenizer), sys.gettrace()
    for number in range(100):
        sys.settrace(trace)
        try:
            conversation.say(str(number), Sampling(max_tokens=1))
            break
        except KeyboardInterrupt:
            roles = [message["role"] for message in conversation.messages]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
        finally:
            sys.settrace(before)
    assert len(lines) > 10


def test_reset_keeps_the_system_message(split: Any, tokenizer: Any) -> None:
    start = [{"role": "system", "content": "Be terse."}]
    conversation = Conversation(split, tokenizer, start)
    one = conversation.say("Hello", GREEDY)
    assert conversation.say("Hello", GREEDY).prompt_tokens > one.prompt_tokens
    conversation.reset()
    assert conversation.messages == start
    assert conversation.say("Hello", GREEDY).text == one.text


def test_text_streams_as_it_comes(split: Any, tokenizer: Any) -> None:
    pieces: list[str] = []
    firsts: list[int] = []
    answer = Conversation(split, tokenizer).complete(
        encode_text(tokenizer, "Hello"),
        Sampling(max_tokens=40),
        pieces.append,
        lambda: firsts.append(len(pieces)),
    )
    assert "".join(pieces) == answer.text
    assert firsts == [0]
    assert (answer.prompt_tokens, answer.tokens, answer.finish_reason) == (5, 40, "length")
    assert 0 < answer.first_token_seconds < answer.seconds


def test_answers_end_with_the_model_or_its_positions(split: Any, tokenizer: Any) -> None:
    ids = encode_text(tokenizer, "Hello")
    free = split.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)[0, 5:]
    split.generation_config.eos_token_id = [int(free[3])]
    try:
        answer = Conversation(split, tokenizer).complete(ids, GREEDY)
        assert (answer.tokens, answer.finish_reason) == (free.tolist().index(int(free[3])) + 1, "stop")
    finally:
        split.generation_config.eos_token_id = None
    full = Conversation(split, tokenizer).complete(ids.repeat(1, 50), Sampling(max_tokens=100))
    assert (full.tokens, full.finish_reason) == (6, "length")


def test_sampling_is_repeatable(split: Any, unsplit: Any, tokenizer: Any) -> None:
    ids = encode_text(tokenizer, "Hello")
    sampling = Sampling(max_tokens=12, temperature=3.0, top_k=20, top_p=0.9, seed=7)
    one, again, same = (
        Conversation(model, tokenizer).complete(ids, sampling).text for model in (split, split, unsplit)
    )
    assert one == again == same


def test_one_token_has_no_rate(split: Any, tokenizer: Any) -> None:
    answer = Conversation(split, tokenizer).complete(encode_text(tokenizer, "Hello"), Sampling(max_tokens=1))
    assert (answer.tokens, answer.tokens_per_second) == (1, 0.0)


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

"""SmolLM2-135M-Instruct through a broker process and a worker process: the same tokens as the unsplit model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from split_common.system.process import running_command
from split_device import SplitModelForCausalLM
from split_device.generation.generator import Generator
from split_device.generation.limits import ONE_ANSWER
from split_device.generation.settings import Sampling
from split_device.generation.tokenizing import encode_chat, load_tokenizer
from split_device.jobs.chat import Conversation
from split_device.jobs.job import ModelChoice
from split_device.jobs.models import Loaded

pytestmark = pytest.mark.real_model

QUESTION = "What is the capital of France, and what is it known for?"


@pytest.fixture(scope="module")
def split(smollm2: Path) -> Iterator[Any]:
    with running_command(["broker", "--bind", "tcp://127.0.0.1:*"]) as (_, broker):
        options = ["--model", str(smollm2), "--broker", broker["address"], "--threads", "1"]
        with (
            running_command(["worker", *options]) as (_, facts),
            SplitModelForCausalLM.from_pretrained(smollm2, broker=broker["address"]) as model,
        ):
            assert (facts["model"], facts["layers"]) == ("smollm2-135m-instruct", "2:28")
            yield model


@pytest.fixture(scope="module")
def unsplit(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2).eval()


def test_a_greedy_answer_is_the_unsplit_models(split: Any, unsplit: Any, smollm2: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    ids = encode_chat(tokenizer, [{"role": "user", "content": QUESTION}])
    answers = [
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        for model in (split, unsplit)
    ]
    assert torch.equal(*answers)
    assert "Paris" in tokenizer.decode(answers[0][0, ids.shape[1] :])


@pytest.mark.long
def test_a_conversation_is_the_unsplit_models(split: Any, unsplit: Any, smollm2: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    messages: list[Any] = []
    with Generator(split, limits=ONE_ANSWER) as generator:
        conversation = Conversation(Loaded(split, tokenizer, generator), ModelChoice(name=str(smollm2)))
        for line in ("Name one animal.", "Describe it in one short sentence.", "And another one?"):
            answer = conversation.say(line, Sampling(max_tokens=16, temperature=0.0))
            messages.append({"role": "user", "content": line})
            ids = encode_chat(tokenizer, messages)
            output = unsplit.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
            assert answer.text == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer.text})


def test_half_precision_travels_in_half_precision(split: Any, smollm2: Path) -> None:
    """A device of another dtype than the worker's: its states cost half the bytes."""
    tokenizer = load_tokenizer(str(smollm2))
    ids = encode_chat(tokenizer, [{"role": "user", "content": QUESTION}])
    address = split._client.transport._address
    with SplitModelForCausalLM.from_pretrained(smollm2, broker=address, dtype="bfloat16") as half:
        half.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        sent = half.traffic["bytes_sent"]
    states = (ids.shape[1] + 7) * 576 * 2
    assert states < sent < 1.5 * states

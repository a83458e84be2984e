"""A worker on a GPU, behind a real broker: the tokens of the unsplit model on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from split_common.system.process import running_command
from split_device import SplitModelForCausalLM

pytestmark = pytest.mark.gpu

WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6}
PROMPTS = [
    torch.randint(3, 90, (1, 5 + 7 * index), generator=torch.Generator().manual_seed(index)) for index in range(8)
]
OPTIONS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "suppress_tokens": [0]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("cuda"), **WIDE)


@pytest.fixture
def split(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Any, dict[str, Any]]]:
    with running_command(["broker", "--bind", "tcp://127.0.0.1:*"]) as (_, broker):
        here = ["--model", str(checkpoint), "--broker", broker["address"], "--kv-memory", "1GiB"]
        with (
            running_command(["worker", *here, "--device", "cuda", "--dtype", request.param]) as (_, facts),
            SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker["address"]) as model,
        ):
            assert (facts["device"], facts["packed"]) == ("cuda", True)
            yield model, facts


def together(model: Any) -> list[torch.Tensor]:
    """Answers to all prompts, asked at once."""
    answers: dict[int, torch.Tensor] = {}

    def ask(index: int) -> None:
        answers[index] = model.generate(PROMPTS[index], attention_mask=torch.ones_like(PROMPTS[index]), **OPTIONS)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[index] for index in range(len(PROMPTS))]


@pytest.mark.parametrize("split", ["float32"], indirect=True)
def test_many_at_once_have_the_unsplit_models_tokens(split: tuple[Any, dict[str, Any]], checkpoint: Path) -> None:
    model, facts = split
    assert facts["attention"] == "sdpa"
    unsplit = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for prompt, answer in zip(PROMPTS, together(model), strict=True):
        assert torch.equal(answer, unsplit.generate(prompt, attention_mask=torch.ones_like(prompt), **OPTIONS))
    beams = {**OPTIONS, "num_beams": 3}
    wanted, got = (
        each.generate(PROMPTS[3], attention_mask=torch.ones_like(PROMPTS[3]), **beams) for each in (unsplit, model)
    )
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("split", ["bfloat16"], indirect=True)
def test_half_precision_runs_over_flash_attention(split: tuple[Any, dict[str, Any]], checkpoint: Path) -> None:
    model, facts = split
    assert facts["attention"] == "flash"
    unsplit = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted, got = (each(PROMPTS[7], use_cache=False).logits for each in (unsplit, model))
    torch.testing.assert_close(got, wanted, atol=0.05 * float(wanted.abs().max()), rtol=0.0)
    for prompt, answer in zip(PROMPTS, together(model), strict=True):
        assert answer.shape == (1, prompt.shape[1] + OPTIONS["max_new_tokens"])

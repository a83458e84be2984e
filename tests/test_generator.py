"""Many requests at once: each gets the tokens that the unsplit model gives it alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import tiny
from fleet import split_model
from split_device.generator import Generator, Request

#: Of several kinds: windows, experts, biases, positions of its own, attention that cannot be packed.
ARCHITECTURES = ["llama", "qwen2_sw", "gemma2", "gpt2", "gpt_neox", "qwen3_moe", "falcon", "bloom", "opt", "ctrl"]


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(3, tiny.VOCABULARY) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


def greedy(tokens: int, **options: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=tokens, **options)


def sampling(tokens: int, **options: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, max_new_tokens=tokens, **options)


def alone(model: Any, request: Request) -> list[int]:
    """What the unsplit model generates for one request."""
    if request.seed is not None:
        torch.manual_seed(request.seed)
    ids = torch.tensor([request.prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=request.config)
    return output[0, len(request.prompt) :].tolist()


def requests(tokens: int) -> list[Request]:
    """A mix of what a request may ask for."""
    kinds: list[dict[str, Any]] = [
        {"config": greedy(tokens)},
        {"config": greedy(tokens, repetition_penalty=1.3)},
        {"config": greedy(tokens, eos_token_id=list(range(40, 50)))},
        {"config": sampling(tokens), "seed": 11},
        {"config": sampling(tokens, temperature=1.7, top_k=20, top_p=0.9), "seed": 12},
        {
            "config": sampling(2 * tokens, min_new_tokens=tokens, eos_token_id=[5, 6], no_repeat_ngram_size=2),
            "seed": 13,
        },
    ]
    return [Request(prompt, **kinds[index % len(kinds)]) for index, prompt in enumerate(prompts(2 * len(kinds)))]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def unsplit(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama).eval()


@pytest.fixture(scope="module")
def split(llama: Path) -> Iterator[Any]:
    with split_model(llama) as model:
        yield model


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("cut", [(2, 2), (0, 0)], ids=str)
def test_the_tokens_are_those_of_each_alone(arch: str, cut: tuple[int, int], tmp_path: Path) -> None:
    checkpoint = tiny.save(arch, tmp_path / arch)
    full = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    wanted = [alone(full, request) for request in requests(8)]
    with split_model(checkpoint, *cut) as model, Generator(model) as generator:
        generations = [generator.submit(request) for request in requests(8)]
        assert [generation.result(60) for generation in generations] == wanted
        assert [generation.finish_reason for generation in generations] == [
            "length" if len(tokens) == request.config.max_new_tokens else "stop"
            for tokens, request in zip(wanted, requests(8), strict=True)
        ]


def test_requests_share_forwards(split: Any, unsplit: Any) -> None:
    asked = [Request(prompt, greedy(20)) for prompt in prompts(24)]
    with Generator(split, max_requests=48) as generator:
        generations = [generator.submit(request) for request in asked]
        assert [each.result(60) for each in generations] == [alone(unsplit, request) for request in asked]
        counters = generator.counters
    assert counters["tokens"] == 24 * 20
    # One at a time would be a turn for each token, and more.
    assert counters["turns"] < 24 * 20 / 3

"""How tokens are chosen: settings, penalties, biases, forbidden tokens, and log probabilities of prompts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import tiny
from fleet import split_model
from split_common.errors import ConfigError
from split_device.generation.bad_words import bad_word_tokens
from split_device.generation.generator import Generator, Request
from split_device.generation.penalties import OccurrencePenalty
from split_device.generation.settings import Sampling
from split_device.jobs.job import JobProgress, ModelChoice, Task
from split_device.jobs.models import Loaded
from wiretap import LATE

pytestmark = pytest.mark.usefixtures("patient_queue")

DRAW = random.Random(7)
PROMPTS = [[DRAW.randrange(3, tiny.VOCABULARY) for _ in range(length)] for length in (1, 5, 12, 30, 3, 9)]


@pytest.fixture(scope="module")
def loaded(checkpoint: Path, split: Any) -> Iterator[Loaded]:
    with Generator(split) as generator:
        yield Loaded(split, AutoTokenizer.from_pretrained(checkpoint), generator)


#: One of each setting, some together, greedy and drawn.
SETTINGS = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.0, frequency_penalty=1.5, presence_penalty=0.5),
    Sampling(temperature=0.0, repetition_penalty=1.4, min_tokens=6),
    Sampling(temperature=0.0, logit_bias={5: 100.0, 6: -100.0}, frequency_penalty=2.0),
    Sampling(temperature=0.0, stop_token_ids=tuple(range(30, 60))),
    Sampling(temperature=1.3, seed=1),
    Sampling(temperature=1.3, top_p=0.8, seed=2, frequency_penalty=-1.0),
    Sampling(temperature=0.7, top_k=12, seed=3, presence_penalty=2.0),
    Sampling(temperature=2.0, min_p=0.3, seed=4, repetition_penalty=0.8),
    Sampling(temperature=1.5, top_p=0.9, top_k=30, min_p=0.1, seed=5, logit_bias={9: 3.0}),
    Sampling(temperature=1.0, seed=6, min_tokens=9, stop_token_ids=tuple(range(3, 60))),
]


def options(sampling: Sampling, prompt: list[int], bad_words: list[list[int]] | None = None) -> dict[str, Any]:
    """Arguments of transformers' own `generate`, written out."""
    given: dict[str, Any] = {"max_new_tokens": 14, "eos_token_id": list(sampling.stop_token_ids or ()) or None}
    if sampling.repetition_penalty:
        given["repetition_penalty"] = sampling.repetition_penalty
    if sampling.logit_bias:
        given["sequence_bias"] = {(token,): bias for token, bias in sampling.logit_bias.items()}
    if sampling.min_tokens:
        given["min_new_tokens"] = sampling.min_tokens
    if bad_words:
        given["bad_words_ids"] = bad_words
    if sampling.temperature:
        given |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p or 1.0}
        given |= {"top_k": sampling.top_k or 0, "min_p": sampling.min_p}
    return given


class Penalties:
    """Frequency and presence penalties as OpenAI's documentation has them, in plain Python."""

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self.settings = prompt, frequency, presence

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        prompt, frequency, presence = self.settings
        generated = ids[0, prompt:].tolist()
        scores = scores.clone()
        for token in set(generated):
            scores[0, token] -= frequency * generated.count(token) + presence
        return scores


def alone(model: Any, prompt: list[int], sampling: Sampling, bad_words: list[list[int]] | None = None) -> list[int]:
    """What the unsplit model generates by itself, with transformers' processors."""
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    ids = torch.tensor([prompt])
    penalties = Penalties(len(prompt), sampling.frequency_penalty or 0.0, sampling.presence_penalty or 0.0)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        logits_processor=[penalties],
        pad_token_id=0,
        **options(sampling, prompt, bad_words),
    )
    return output[0, len(prompt) :].tolist()


def request_for(loaded: Loaded, prompt: list[int], sampling: Sampling) -> Request:
    task = Task(model=ModelChoice(name="tiny"), prompt="-", sampling=sampling)
    return loaded.request(task, JobProgress([], "", None), 0, prompt)


def settled(sampling: Sampling) -> Sampling:
    """With as many tokens as `alone` asks for, and no end tokens but its own."""
    return Sampling(**{**vars(sampling), "max_tokens": 14, "ignore_eos": True})


def test_settings_give_what_transformers_gives(loaded: Loaded, unsplit: Any) -> None:
    """All of them at once, so that each turn has rows of many kinds."""
    asked = [(prompt, sampling) for prompt in PROMPTS[:4] for sampling in SETTINGS]
    requests = [request_for(loaded, prompt, settled(sampling)) for prompt, sampling in asked]
    generations = [loaded.generator.submit(request) for request in requests]
    found = [generation.result(LATE) for generation in generations]
    assert found == [alone(unsplit, *each) for each in asked]
    ended = [generation.finish_reason for generation in generations]
    assert "stop" in ended
    assert "length" in ended


def test_bad_words(loaded: Loaded, unsplit: Any) -> None:
    plain = alone(unsplit, PROMPTS[2], SETTINGS[0])
    text = loaded.tokenizer.decode(plain[2:3])
    words = (text, loaded.tokenizer.decode(plain[4:6]))
    request = request_for(loaded, PROMPTS[2], settled(Sampling(temperature=0.0, bad_words=words)))
    found = loaded.generator.submit(request).result(LATE)
    ids = [list(word) for word in bad_word_tokens(loaded.tokenizer, words)]
    assert ids
    assert found == alone(unsplit, PROMPTS[2], SETTINGS[0], ids)
    assert found != plain
    for word in words:
        assert word not in loaded.tokenizer.decode(found)


def test_an_answer_goes_on_after_the_end_token(loaded: Loaded, unsplit: Any) -> None:
    plain = alone(unsplit, PROMPTS[1], SETTINGS[0])
    end = next(token for token in plain if token != plain[0])
    tokenizer_end, loaded.tokenizer.eos_token_id = loaded.tokenizer.eos_token_id, end
    try:
        lengths = []
        for ignored in (None, True):
            sampling = Sampling(14, 0.0, ignore_eos=ignored)
            generation = loaded.generator.submit(request_for(loaded, PROMPTS[1], sampling))
            lengths.append((len(generation.result(LATE)), generation.finish_reason))
    finally:
        loaded.tokenizer.eos_token_id = tokenizer_end
    assert lengths == [(plain.index(end) + 1, "stop"), (14, "length")]


def test_penalties_are_those_of_the_reference() -> None:
    ids = torch.tensor([[1, 2, 3, 3, 4, 3], [1, 2, 5, 6, 7, 8]])
    scores = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
    found = OccurrencePenalty(2, 0.7, -0.3)(ids, scores)
    for row in range(2):
        wanted = Penalties(2, 0.7, -0.3)(ids[row : row + 1], scores[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], wanted)


# --- log probabilities of prompts --------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [(2, 2), (2, 0), (0, 0)], ids=str)
def test_log_probabilities_of_a_prompt(
    cut: tuple[int, int], checkpoint: Path, unsplit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of five tokens, beside requests that want none."""
    monkeypatch.setattr("split_device.generation.prompt_scoring.MAX_LOGITS", 5 * tiny.VOCABULARY)
    config = GenerationConfig(do_sample=False, max_new_tokens=4)
    with split_model(checkpoint, *cut) as model, Generator(model) as generator:
        scored = [generator.submit(Request(prompt, config, prompt_logprobs=3)) for prompt in PROMPTS]
        bare = generator.submit(Request(PROMPTS[3], config, prompt_logprobs=0))
        plain = [generator.submit(Request(prompt, config)) for prompt in PROMPTS]
        tokens = [each.result(LATE) for each in scored]
        assert tokens == [each.result(LATE) for each in plain]
        bare.result(LATE)
    for prompt, generation in zip(PROMPTS, scored, strict=True):
        with torch.inference_mode():
            wanted = torch.log_softmax(unsplit(torch.tensor([prompt])).logits[0].float(), -1)
        first, *found = generation.prompt_logprobs
        assert first is None
        assert len(found) == len(prompt) - 1
        for logprobs, token, row in zip(found, prompt[1:], wanted, strict=False):
            assert logprobs is not None
            assert logprobs.chosen == pytest.approx(float(row[token]), abs=1e-4)
            top = row.topk(3)
            assert [token for token, _ in logprobs.top] == top.indices.tolist()
            assert [value for _, value in logprobs.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert all(each is not None and each.top == [] for each in bare.prompt_logprobs[1:])
    assert all(each.prompt_logprobs == [] for each in plain)


def test_a_prompts_log_probabilities_come_before_the_first_token(loaded: Loaded) -> None:
    lengths = []
    config = GenerationConfig(do_sample=False, max_new_tokens=1)
    generation = loaded.generator.submit(
        Request(PROMPTS[3], config, prompt_logprobs=1), lambda *_: lengths.append(len(generation.prompt_logprobs))
    )
    generation.result(LATE)
    assert lengths == [len(PROMPTS[3])]


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", 2.1),
        ("presence_penalty", float("nan")),
        ("repetition_penalty", 0),
        ("min_p", 1.5),
        ("min_tokens", -1),
        ("min_tokens", 10_000),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {5: 101}),
        ("logit_bias", [5]),
        ("logit_bias", dict.fromkeys(range(2000), 1)),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", 5),
        ("bad_words", ["x", ""]),
        ("bad_words", "text"),
        ("bad_words", ["x"] * 2000),
        ("ignore_eos", "yes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_values_out_of_bounds(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        Sampling(**{field: value}).checked()


def test_settings_have_one_form() -> None:
    given = Sampling(9, logit_bias={"5": 1}, stop_token_ids=[7], bad_words=["a"], ignore_eos=False)  # type: ignore[dict-item, arg-type]
    assert given.checked() == Sampling(9, logit_bias={5: 1.0}, stop_token_ids=(7,), bad_words=("a",))
    assert Sampling(logit_bias={}, stop_token_ids=(), bad_words=()).checked() == Sampling()


@pytest.mark.parametrize(
    "sampling", [Sampling(logit_bias={tiny.VOCABULARY: 1.0}), Sampling(bad_words=("never",))], ids=str
)
def test_tokens_that_the_model_does_not_have(loaded: Loaded, sampling: Sampling) -> None:
    request = request_for(loaded, PROMPTS[0], sampling)
    if sampling.bad_words:
        request.config.bad_words_ids = [[3, tiny.VOCABULARY]]
    with pytest.raises(ConfigError, match=f"token {tiny.VOCABULARY}"):
        loaded.generator.submit(request)


def test_a_token_to_stop_at_that_the_model_does_not_have(loaded: Loaded) -> None:
    with pytest.raises(ConfigError, match=f"token {tiny.VOCABULARY} is not among"):
        request_for(loaded, PROMPTS[0], Sampling(stop_token_ids=(5, tiny.VOCABULARY)))

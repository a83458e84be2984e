"""Speculation: the tokens of the unsplit model, whatever is drafted, in fewer steps than tokens."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import tiny
from fleet import joined, replaced, running_broker, split_model
from split_common.errors import ConfigError, UnsupportedFeature
from split_device.generation.constraint import Grammars
from split_device.generation.generator import Generation, Generator, Request
from split_device.generation.structured import StructuredOutputs
from split_device.speculation.drafters import DRAFTERS
from wiretap import LATE

pytestmark = pytest.mark.usefixtures("patient_queue")

TOKENS = 24


class Known:
    """A drafter that knows the texts of all requests. What it makes of them is up to `change`."""

    def __init__(self, texts: dict[tuple[int, ...], list[int]], change: Callable[[list[int]], list[int]]) -> None:
        self._texts, self._change = texts, change
        self._tokens: list[int] = []
        self._text: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        if not self._tokens:
            texts = ([*prompt, *text] for prompt, text in self._texts.items())
            (self._text,) = (text for text in texts if text[: len(tokens)] == [*tokens])
        self._tokens += tokens
        assert self._text[: len(self._tokens)] == self._tokens, "what was committed is not the text"

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        assert logits.shape == (len(tokens), tiny.VOCABULARY)

    def draft(self, limit: int) -> list[int]:
        here = len(self._tokens)
        return self._change(self._text[here : here + limit])


def wrong(draft: list[int]) -> list[int]:
    return [(token + 1) % tiny.VOCABULARY for token in draft]


def mixed(seed: int) -> Callable[[list[int]], list[int]]:
    """Drafts of random lengths, right up to a random place."""
    draw = random.Random(seed)

    def change(draft: list[int]) -> list[int]:
        draft = draft[: draw.randrange(len(draft) + 1)]
        right = draw.randrange(len(draft) + 1)
        return [*draft[:right], *wrong(draft[right:])]

    return change


class Endless:
    """Drafts as much as it may, of one token."""

    def extend(self, tokens: Sequence[int]) -> None: ...

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None: ...

    def draft(self, limit: int) -> list[int]:
        return [7] * limit


CHANGES: dict[str, Callable[[list[int]], list[int]]] = {"right": list, "wrong": wrong, "mixed": mixed(5)}


@pytest.fixture(scope="module")
def grammars(checkpoint: Path) -> Grammars:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return Grammars(tokenizer, tiny.VOCABULARY, {tokenizer.eos_token_id})


def greedy(tokens: int = TOKENS, **options: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=tokens, **options)


def sampling(tokens: int = TOKENS, **options: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, max_new_tokens=tokens, **options)


def greedily(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """What the unsplit model says."""
    output = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
    found: list[int] = output[0, len(prompt) :].tolist()
    return found


def requests(grammars: Grammars) -> list[Request]:
    """A mix of what a request may ask for. Each prompt is another one."""
    regex = grammars.constraint(StructuredOutputs(regex="(ab|cd){3}-forced-[0-9]{2}.*"))
    choice = grammars.constraint(StructuredOutputs(choice=("one of these", "one of those", "none")))
    kinds: list[dict[str, Any]] = [
        {"config": greedy()},
        {"config": greedy(1)},
        {"config": greedy(repetition_penalty=1.3), "logprobs": 2},
        {"config": greedy(eos_token_id=list(range(40, 60)))},
        {"config": sampling(), "seed": 11},
        {"config": sampling(temperature=1.7, top_k=20, top_p=0.9), "seed": 12, "prompt_logprobs": 1},
        {"config": sampling(min_new_tokens=6, eos_token_id=[5, 6], no_repeat_ngram_size=2), "seed": 13},
        {"config": greedy(), "frequency_penalty": 1.0, "presence_penalty": 0.5},
        {"config": greedy(), "constraint": regex},
        {"config": sampling(temperature=1.5), "seed": 14, "constraint": choice},
    ]
    # Repetitions, so that prompt lookup finds something.
    return [Request([index + 3, 17, 17, 33, 17, 17, 33], **kind) for index, kind in enumerate(kinds)]


def results(generations: Sequence[Generation]) -> list[Any]:
    """All that a generation says of its tokens."""
    return [(each.result(LATE), each.finish_reason) for each in generations]


def logged(model: Any, asked: list[Request], speculate: str) -> tuple[list[Any], list[Any], Generator]:
    """Results, each token's log probabilities and state of the sampler, and the generator."""
    heard: list[Any] = []

    def listen(index: int) -> Any:
        return lambda token, logprobs, state: heard.append((index, token, logprobs and logprobs.chosen, state))

    with Generator(model, speculate=speculate) as generator:
        generations = [generator.submit(request, listen(index)) for index, request in enumerate(asked)]
        return results(generations), sorted(heard, key=lambda each: each[0]), generator


@pytest.fixture(scope="module")
def plain(split: Any, grammars: Grammars) -> tuple[list[Any], list[Any]]:
    """Without speculation, which other tests compare with the unsplit model."""
    found, heard, generator = logged(split, requests(grammars), "off")
    assert generator.counters["drafted_tokens"] == 0
    return found, heard


@pytest.mark.parametrize("name", [*DRAFTERS, "auto", *CHANGES])
def test_no_draft_changes_a_token(
    name: str, split: Any, plain: tuple[Any, Any], grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, heard_plain = plain
    texts = {tuple(each.prompt): found[0] for each, found in zip(requests(grammars), wanted, strict=True)}
    if name in CHANGES:
        monkeypatch.setitem(DRAFTERS, name, lambda _: Known(texts, CHANGES[name]))
    found, heard, generator = logged(split, requests(grammars), name)
    assert found == wanted
    for one, other in zip(heard, heard_plain, strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2], abs=1e-4)
        assert one[3] == other[3], "a seed draws once for each token"
    counters = generator.counters
    if name == "right":
        assert counters["accepted_tokens"] == counters["drafted_tokens"] > 100
        assert counters["steps"] < counters["tokens"] / 3
    elif name == "wrong":
        assert counters["drafted_tokens"] > 100
        assert counters["accepted_tokens"] == 0
    elif name == "mixed":
        assert 0 < counters["accepted_tokens"] < counters["drafted_tokens"]


def test_a_request_may_bring_its_own_drafter(split: Any, plain: tuple[Any, Any], grammars: Grammars) -> None:
    asked, wanted = requests(grammars)[0], plain[0][0]
    texts = {tuple(asked.prompt): wanted[0]}
    with Generator(split, prefix_cache=0, speculate="off") as generator:
        own = dataclasses.replace(asked, speculate=Known(texts, list))
        assert results([generator.submit(own)]) == [wanted]
        assert generator.counters["accepted_tokens"] == generator.counters["drafted_tokens"] > TOKENS / 2


class Likeliest:
    """Drafts the likeliest continuations after the first token of an answer, by `texts`."""

    def __init__(self, texts: dict[int, list[int]]) -> None:
        self._texts = texts
        self._text: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        # The first call brings the prompt and the answer's first token.
        self._text = [*self._text, *tokens] if self._text else [tokens[-1]]

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None: ...

    def draft(self, limit: int) -> list[int]:
        text = self._texts[self._text[0]]
        return text[len(self._text) :][:limit] if text[: len(self._text)] == self._text else []


def test_drafts_leave_the_distribution_as_it_is(split: Any, unsplit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A χ² test at temperature 1, against chances computed from the unsplit model's logits."""
    prompt, choices, count = [5, 17, 33, 9], 3, 200
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        with torch.inference_mode():
            logits = unsplit(torch.tensor([[*prompt, *text] for text in chances])).logits[:, -1]
        for (text, chance), row in zip(chances.items(), logits, strict=True):
            top = row.topk(choices)
            for token, share in zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True):
                longer[*text, token] = chance * share
        chances = longer
    # The likeliest text after each first token.
    texts = {text[0]: [*text] for text in sorted(chances, key=chances.__getitem__)}
    monkeypatch.setitem(DRAFTERS, "likeliest", lambda _: Likeliest(texts))
    with Generator(split, speculate="likeliest") as generator:
        config = sampling(3, temperature=1.0, top_k=choices)
        generations = [generator.submit(Request(prompt, config, seed=seed)) for seed in range(count)]
        seen = Counter(tuple(each.result(LATE)) for each in generations)
    drafted, accepted = (generator.counters[f"{name}_tokens"] for name in ("drafted", "accepted"))
    assert count / 10 < accepted < drafted - count / 10
    assert seen.keys() <= chances.keys()
    statistic = sum((seen[text] - count * chance) ** 2 / (count * chance) for text, chance in chances.items())
    freedom = torch.tensor((len(chances) - 1) / 2)
    assert torch.special.gammaincc(freedom, torch.tensor(statistic / 2)) > 1e-3


def test_a_text_that_ends_within_a_draft_is_kept_for_later_requests(
    split: Any, unsplit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = list(range(3, 30))
    text = greedily(unsplit, prompt, 40)
    end = text[9]
    text = text[: text.index(end) + 1]
    monkeypatch.setitem(
        DRAFTERS, "known", lambda _: Known({tuple(prompt): text}, lambda draft: [*draft, 7, 7][:15])
    )
    with Generator(split, speculate="known") as generator:
        first = generator.submit(Request(prompt, greedy(40, eos_token_id=end)))
        assert (first.result(LATE), first.finish_reason) == (text, "stop")
        longer = [*prompt, *text, 8, 9]
        later = generator.submit(Request(longer, greedy(12), speculate="off"))
        assert later.result(LATE) == greedily(unsplit, longer, 12)
        # The last token was in the draft, so it went through the model as well.
        assert later.cached_tokens in (len(prompt) + len(text) - 1, len(prompt) + len(text))
        assert (later.drafted_tokens, later.accepted_tokens) == (0, 0)


def test_drafts_need_no_more_room_than_the_text(
    checkpoint: Path, unsplit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DRAFTERS, "endless", lambda _: Endless())
    monkeypatch.setattr("fleet.KV_BYTES", 2**14)
    prompt = list(range(3, 30))
    with running_broker() as broker, joined(broker.address, checkpoint, patience=0.0) as (model, worker):
        room = worker.facts()["kv_tokens"]
        text = greedily(unsplit, prompt, room - len(prompt))
        end = next(token for index, token in enumerate(text) if index > len(text) - 8 and token not in text[:index])
        text = text[: text.index(end) + 1]
        asked = Request(prompt, greedy(200, eos_token_id=end))
        with Generator(model, speculate="endless") as generator:
            generation = generator.submit(asked)
            assert generation.result(LATE) == text
            assert generation.drafted_tokens > 0
            # Here the room for the text itself is bounded: by max_new_tokens, and by the model's positions.
            assert len(generator.submit(Request(prompt, greedy(3))).result(LATE)) == 3


def test_the_models_positions_end_a_text(split: Any, unsplit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DRAFTERS, "endless", lambda _: Endless())
    prompt = [5] * 240
    with Generator(split, speculate="endless") as generator:
        generation = generator.submit(Request(prompt, greedy(100)))
        assert generation.result(LATE) == greedily(unsplit, prompt, 17)
        assert generation.finish_reason == "length"


def test_cancelled_requests_disturb_no_other(split: Any, unsplit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DRAFTERS, "endless", lambda _: Endless())
    prompts = [[index + 3, 4, 5] for index in range(6)]
    with Generator(split, speculate="endless") as generator:
        generations: list[Generation] = []

        def cancel(index: int) -> Any:
            # The first tokens may come before `submit` returns.
            return lambda *_: [each.cancel() for each in generations[index : index + 1] if len(each.tokens) > 5]

        for index, prompt in enumerate(prompts):
            generations.append(generator.submit(Request(prompt, greedy(30)), cancel(index) if index % 2 else None))
        for index, (prompt, generation) in enumerate(zip(prompts, generations, strict=True)):
            tokens = generation.result(LATE)
            assert tokens == greedily(unsplit, prompt, 30)[: len(tokens)]
            assert (generation.finish_reason, len(tokens) == 30) == (
                ("cancelled", False) if index % 2 else ("length", True)
            )


@pytest.mark.long
def test_a_worker_that_goes_away(
    checkpoint: Path, plain: tuple[Any, Any], grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = plain
    texts = {tuple(each.prompt): found[0] for each, found in zip(requests(grammars), wanted, strict=True)}
    monkeypatch.setitem(DRAFTERS, "mixed", lambda _: Known(texts, mixed(7)))
    with (
        running_broker() as broker,
        joined(broker.address, checkpoint) as (model, worker),
        Generator(model, speculate="mixed") as generator,
        replaced(worker, checkpoint, broker.address, lambda: generator.counters["accepted_tokens"] > 5) as strike,
    ):
        generations = [generator.submit(request, strike) for request in requests(grammars)]
        assert results(generations) == wanted
        assert model.traffic["replays"] > 0


def test_models_that_cannot_take_tokens_back_are_refused_by_name(tmp_path: Path) -> None:
    with split_model(tiny.save("llama", tmp_path / "longrope", rope_parameters=tiny.LONGROPE)) as model:
        with pytest.raises(UnsupportedFeature, match="speculate 'ngram' cannot be done with this model"):
            Generator(model, speculate="ngram")
        with Generator(model, speculate="auto") as generator:
            assert generator.submit(Request([5], greedy(1))).speculate == "off"
            with pytest.raises(UnsupportedFeature, match="different results for tokens that go through together"):
                generator.submit(Request([5], greedy(1), speculate="ngram"))


def test_what_there_is_not_is_refused(split: Any) -> None:
    with pytest.raises(ConfigError, match="invalid speculate 'eagle': expected one of auto, off"):
        Generator(split, speculate="eagle")
    with Generator(split) as generator, pytest.raises(ConfigError, match="invalid speculate ''"):
        generator.submit(Request([5], greedy(1), speculate=""))

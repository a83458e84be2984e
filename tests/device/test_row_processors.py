"""Many rows at once get the numbers, bit by bit, that transformers' processors give to each row alone."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from split_common.errors import ConfigError, ModelError
from split_device.generation.choosing import choose_tokens
from split_device.generation.occurrences import Occurrences
from split_device.generation.penalties import OccurrencePenalty
from split_device.generation.row_processors import TOGETHER
from split_device.generation.sequence_bias import SequenceBias

VOCABULARY = 5003
PROMPT = 20


def scores(rows: int, seed: int = 0) -> torch.Tensor:
    """From nearly flat to nearly certain distributions; the last row has many ties."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, VOCABULARY, generator=generator) * torch.linspace(0.01, 9, rows)[:, None]
    found[-1] = found[-1].round()
    return found


def texts(rows: int) -> list[list[int]]:
    draw = random.Random(4)
    return [[draw.randrange(400) for _ in range(PROMPT + row)] for row in range(rows)]


def counted(kind: type, ids: list[int]) -> Occurrences:
    return Occurrences(ids[PROMPT:] if kind is OccurrencePenalty else ids)


def processors(kind: type, rows: int) -> list[Any]:
    shares = torch.linspace(0.001, 0.9999, rows).tolist()
    made = {
        RepetitionPenaltyLogitsProcessor: lambda row: RepetitionPenaltyLogitsProcessor(0.5 + row / 7),
        OccurrencePenalty: lambda row: OccurrencePenalty(PROMPT, row / 9 - 1, 1 - row / 5),
        TemperatureLogitsWarper: lambda row: TemperatureLogitsWarper(0.3 + row / 7),
        TopKLogitsWarper: lambda row: TopKLogitsWarper(1 + 400 * row),
        TopPLogitsWarper: lambda row: TopPLogitsWarper(shares[row]),
        MinPLogitsWarper: lambda row: MinPLogitsWarper(shares[-row - 1]),
    }
    return [made[kind](row) for row in range(rows)]


@pytest.mark.parametrize("kind", TOGETHER, ids=lambda kind: kind.__name__)
def test_each_kind(kind: type) -> None:
    rows = 24
    own, given, found = processors(kind, rows), texts(rows), scores(rows)
    wanted = [own[row](torch.tensor([given[row]]), found[row : row + 1].clone()) for row in range(rows)]
    TOGETHER[kind](found, own, [counted(kind, ids) for ids in given])
    assert torch.equal(found, torch.cat(wanted))


@pytest.mark.parametrize("seed", range(4))
def test_sums_at_the_edge_of_top_p(seed: int) -> None:
    """The share of each row is a sum of its own probabilities."""
    rows = 24
    found = scores(rows, seed) * 2
    sums = found.softmax(-1).sort(descending=True).values.cumsum(1)
    own = [TopPLogitsWarper(float(sums[row, 3 * row].clamp(max=0.99999))) for row in range(rows)]
    wanted = [own[row](None, found[row : row + 1].clone()) for row in range(rows)]
    TOGETHER[TopPLogitsWarper](found, own, [])
    assert torch.equal(found, torch.cat(wanted))


def test_biases_of_sequences() -> None:
    """As transformers adds them, with a few operations however many lengths the sequences have."""
    draw, given = random.Random(6), texts(24)
    biases = {(draw.randrange(VOCABULARY),): draw.uniform(-9, 9) for _ in range(50)}
    for row, ids in enumerate(given):
        for length in range(1, len(ids) + 3):
            before = [0] * (length - len(ids)) + ids[-length:]
            biases[*before, draw.randrange(5)] = draw.uniform(-9, 9) if row % 2 else -torch.inf
            biases[*before[1:], ids[0], draw.randrange(5)] = 1.0
    own = SequenceBias(SequenceBiasLogitsProcessor(biases))
    wanted = SequenceBiasLogitsProcessor(biases)
    for ids, row in zip([*given, [7], [399]], scores(26), strict=True):
        with Operations() as operations:
            found = own(torch.tensor([ids]), row[None])
        assert torch.equal(found, wanted(torch.tensor([ids]), row[None]))
        assert operations.count < 25
    words = NoBadWordsLogitsProcessor([[3], [4, 5, 6], [5, 6]], eos_token_id=torch.tensor([2]))
    ids = torch.tensor([[4, 5]])
    assert torch.equal(SequenceBias(words)(ids, row[None]), words(ids, row[None]))


class Operations(TorchFunctionMode):
    """Counts calls of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_tokens_without_a_logit_do_not_count() -> None:
    found, given = scores(2), [[1, VOCABULARY + 5], [VOCABULARY, 2]]
    own = processors(RepetitionPenaltyLogitsProcessor, 2)
    wanted = [own[row](torch.tensor([given[row]]), found[row : row + 1].clone()) for row in range(2)]
    TOGETHER[RepetitionPenaltyLogitsProcessor](found, own, [Occurrences(ids) for ids in given])
    assert torch.equal(found, torch.cat(wanted))


def sampler(ids: list[int], own: list[Any], seed: int | None, logprobs: int | None = None) -> Any:
    return SimpleNamespace(
        processors=own,
        ids=torch.tensor([ids]),
        likeliest=not own and seed is None,
        generator=torch.Generator().manual_seed(seed) if seed is not None else None,
        occurrences={kind: counted(kind, ids) for kind in (RepetitionPenaltyLogitsProcessor, OccurrencePenalty)},
        logprobs=logprobs,
    )


def mixed(rows: int) -> list[list[Any]]:
    """Lists of processors that have little in common, each in an order that `generate` has."""
    draw = random.Random(5)
    kinds = [*TOGETHER]
    made = {kind: processors(kind, rows) for kind in kinds}
    lists = []
    for row in range(rows):
        own = [made[kind][row] for kind in kinds if draw.random() < 0.5]
        if row % 3 == 0:
            own.insert(draw.randrange(len(own) + 1), NoRepeatNGramLogitsProcessor(1))
        if row % 4 == 0:
            own.append(TypicalLogitsWarper(0.8))
        lists.append(own)
    return lists


def test_rows_of_many_kinds() -> None:
    rows = 40
    given, lists, logits = texts(rows), mixed(rows), scores(rows)
    samplers = [
        sampler(ids, own, None if row % 5 == 0 else row, 2 if row % 2 else None)
        for row, (ids, own) in enumerate(zip(given, lists, strict=True))
    ]
    states = [each.generator.get_state() if each.generator else None for each in samplers]
    before = logits.clone()
    found = choose_tokens(samplers, logits)
    assert torch.equal(logits, before)
    for row, (each, choice) in enumerate(zip(samplers, found, strict=True)):
        assert not isinstance(choice, Exception)
        own = LogitsProcessorList(lists[row])(each.ids, logits[row : row + 1].clone())
        if states[row] is None:
            assert choice[0] == int(own.argmax())
        else:
            alone = torch.Generator()
            alone.set_state(states[row])
            assert choice[0] == int(torch.multinomial(own.softmax(-1), 1, generator=alone))
            assert torch.equal(alone.get_state(), each.generator.get_state())
        if each.logprobs is None:
            assert choice[1] is None
        else:
            wanted = torch.log_softmax(logits[row], -1)
            assert choice[1] is not None
            assert choice[1].chosen == float(wanted[choice[0]])
            assert choice[1].top == [(int(token), float(wanted[token])) for token in wanted.topk(2).indices]


def test_an_error_concerns_its_row_alone() -> None:
    def broken(_ids: Any, _scores: Any) -> Any:
        raise ValueError("broken")

    own = [[], [broken], [TemperatureLogitsWarper(1e-40)], [TopKLogitsWarper(5)]]
    found = choose_tokens([sampler([1], each, 3) for each in own], scores(4))
    wanted = choose_tokens([sampler([1], each, 3) for each in (own[0], own[3])], scores(4)[[0, 3]])
    assert [found[0], found[3]] == wanted
    assert isinstance(found[1], ValueError)
    assert isinstance(found[2], ConfigError)


def test_no_token_is_chosen_from_nan() -> None:
    logits = scores(4)
    logits[1, 7] = logits[2, 0] = math.nan
    logits[3, 1:] = -math.inf
    made = [sampler([1], [], 3), sampler([1], [], 3), sampler([1], [], None, 2), sampler([1], [], None)]
    found = choose_tokens(made, logits)
    assert [isinstance(choice, ModelError) for choice in found] == [False, True, True, False]

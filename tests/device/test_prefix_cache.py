"""The prefix cache: requests begin with what others have computed, and get the tokens of the unsplit model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_generator import alone, greedy
from transformers import AutoModelForCausalLM

import tiny
from fleet import joined, running_broker
from split_device.generation.generator import Generator, Request
from split_worker.worker import Worker
from wiretap import LATE, wait_until

pytestmark = pytest.mark.usefixtures("patient_queue")


def text(tokens: int, seed: int = 1) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, tiny.VOCABULARY) for _ in range(tokens)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def unsplit(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama).eval()


@pytest.fixture(scope="module")
def fleet(llama: Path) -> Iterator[tuple[Any, Worker]]:
    with running_broker() as broker, joined(broker.address, llama) as (model, worker):
        yield model, worker


def conversation(generator: Generator, unsplit: Any, turns: int, seed: int = 1) -> list[tuple[int, int]]:
    """Asks again and again, with all that was said. Returns how long each prompt was, and how much was cached."""
    said: list[int] = text(20, seed)
    seen = []
    for turn in range(turns):
        request = Request(list(said), greedy(8))
        generation = generator.submit(request)
        assert generation.result(LATE) == alone(unsplit, request)
        seen.append((len(said), generation.cached_tokens))
        said += [*generation.tokens, *text(5, seed + turn + 100)]
    return seen


def test_each_turn_computes_what_is_new(fleet: tuple[Any, Worker], unsplit: Any) -> None:
    model, worker = fleet
    with Generator(model) as generator:
        before = worker.facts()["tokens"]
        seen = conversation(generator, unsplit, 6)
        # All but the last token of each answer has gone through the model.
        assert seen == [(20, 0), *((20 + 13 * turn, 19 + 13 * turn - 5) for turn in range(1, 6))]
        computed = worker.facts()["tokens"] - before
        assert computed == sum(prompt - cached for prompt, cached in seen) + 6 * 7
        # What a later turn has makes what an earlier one left useless.
        assert worker.facts()["kept"] == worker.facts()["sessions"] == 1
    wait_until(lambda: not worker.facts()["sessions"])


def test_a_beginning_of_many_is_computed_once(fleet: tuple[Any, Worker], unsplit: Any) -> None:
    model, worker = fleet
    common = text(100)
    asked = [Request([*common, *text(4, seed)], greedy(6)) for seed in range(2, 14)]
    with Generator(model) as generator:
        before = worker.facts()["tokens"]
        generations = [generator.submit(request) for request in asked]
        assert [each.result(LATE) for each in generations] == [alone(unsplit, request) for request in asked]
        assert sorted(each.cached_tokens for each in generations) == [0] + [100] * 11
        assert worker.facts()["tokens"] - before == 100 + 12 * (4 + 5)
        later = generator.submit(asked[3])
        assert later.result(LATE) == alone(unsplit, asked[3])
        assert later.cached_tokens == 103
    wait_until(lambda: not worker.facts()["sessions"])

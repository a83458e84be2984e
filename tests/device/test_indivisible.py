"""Layers that compute tokens otherwise if they do not go through together: tokens equal the unsplit model's.

The layers of these models choose keys by a mask. Where several keys are alike, the number of tokens decides.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generator import alone, greedy
from test_speculation import Endless
from transformers import AutoModelForCausalLM

import tiny
from fleet import running_broker, split_model, start_worker
from split_common.errors import HistoryLost, UnsupportedFeature
from split_common.models.codecs.exact import Exact
from split_common.protocol import payloads
from split_device import SplitModelForCausalLM
from split_device.generation.generator import Generation, Generator, Request
from split_device.sessions import chunks
from split_device.sessions.history import History
from split_device.sessions.places import PlacedRun
from split_device.speculation.drafters import DRAFTERS
from wiretap import LATE, record_requests

pytestmark = pytest.mark.usefixtures("patient_queue")

ARCH = "doge"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


def text(tokens: int, seed: int) -> list[int]:
    ids: list[int] = torch.randint(
        3, tiny.VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return ids


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(ARCH, tmp_path_factory.mktemp("model") / ARCH)


@pytest.fixture(scope="module")
def unsplit(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.mark.parametrize("cut", [(2, 2), (0, 0)], ids=str)
def test_requests_that_begin_alike(
    cut: tuple[int, int], checkpoint: Path, unsplit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are not cut, not even where only the worker's layers show what kind of a model it is."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 16 * 32 * 4)
    begin = text(40, 1)
    asked = [Request(begin + text(more, seed), greedy(12)) for seed, more in enumerate((40, 3, 50, 1))]
    wanted = [alone(unsplit, request) for request in asked]
    with split_model(checkpoint, *cut) as model, Generator(model) as generator:
        for _ in range(2):
            generations = [generator.submit(request) for request in asked]
            assert [each.result(LATE) for each in generations] == wanted
            assert not any(each.cached_tokens for each in generations)
        resumed = Request(asked[0].prompt, asked[0].config, generated=wanted[0][:5])
        assert generator.submit(resumed).result(LATE) == wanted[0]


class Forcing:
    """A constraint that leaves no choice about some tokens."""

    def __init__(self, *tokens: int | None) -> None:
        self._left = [*tokens]
        self.finished = False

    def mask(self) -> torch.Tensor | None:
        if (token := self.forced()) is None:
            return None
        return torch.arange(tiny.VOCABULARY) == token

    def forced(self) -> int | None:
        return self._left[0] if self._left else None

    def accept(self, token: int) -> None:
        del self._left[:1]


def test_a_request_that_waits_while_a_worker_shows_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that a constraint forces do not go through together either."""
    sent = record_requests(monkeypatch)
    gate = threading.Event()
    with split_model(checkpoint, 0, 0) as model, Generator(model, max_requests=1) as generator:
        generator._post(gate.wait, LATE)
        first = generator.submit(Request(text(9, 1), greedy(2)))
        waiting = generator.submit(Request(text(10, 2), greedy(8), constraint=Forcing(None, 5, 6, 7, 8)))
        gate.set()
        assert len(first.result(LATE)) == 2
        assert waiting.result(LATE)[1:5] == [5, 6, 7, 8]
    steps = [request.tokens for request in sent if isinstance(request, payloads.Step)]
    assert steps[-8:] == [10, 1, 1, 1, 1, 1, 1, 1]


def test_another_worker_takes_over(checkpoint: Path, unsplit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 16 * 32 * 4)
    prompt = torch.tensor([text(40, 1)])
    tokens: list[int] = []
    with running_broker() as broker:
        workers = [start_worker(checkpoint, broker.address) for _ in range(2)]

        def strike(_ids: torch.Tensor, _scores: torch.Tensor, **_: Any) -> bool:
            tokens.append(0)
            if len(tokens) == 5:
                next(worker for worker in workers if len(worker._sessions)).stop()
            return False

        try:
            with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address) as model:
                answer = model.generate(prompt, stopping_criteria=[strike], **GREEDY)
                assert answer.tolist() == unsplit.generate(prompt, **GREEDY).tolist()
                assert model.traffic["replays"] == 1
        finally:
            for worker in workers:
                worker.stop()


@pytest.mark.long
@pytest.mark.parametrize("speculate", ["endless", "off"])
def test_requests_move_to_a_worker_that_is_indivisible(
    speculate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a draft took part in, or was copied, cannot be rebuilt there, so it begins again, token by token."""
    monkeypatch.setitem(DRAFTERS, "endless", lambda _: Endless())
    checkpoint = tiny.save("llama", tmp_path / "llama")
    reference = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    begin = [7, 17, 33] * 12
    first, later = Request([*begin, 33, 9], greedy(12)), Request([*begin, 8, 17, 33, 17], greedy(30))
    wanted = [alone(reference, request) for request in (first, later)]
    with running_broker() as broker:
        workers = [start_worker(checkpoint, broker.address)]

        def strike(*_: Any) -> None:
            if len(generations[-1].tokens) == 9 and len(workers) == 1:
                monkeypatch.setattr("split_common.engine.runner.is_indivisible", lambda *_: True)
                workers.append(start_worker(checkpoint, broker.address))
                workers[0].stop()

        generations: list[Generation] = []
        try:
            with (
                SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address) as model,
                Generator(model, speculate=speculate) as generator,
            ):
                assert generator.submit(first).result(LATE) == wanted[0]
                gate = threading.Event()
                generator._post(gate.wait, LATE)
                generations.append(generator.submit(later, strike))
                gate.set()
                assert generations[0].result(LATE) == wanted[1]
                assert generator.counters["cached_tokens"] == len(begin)
                assert bool(generator.counters["drafted_tokens"]) == (speculate != "off")
                assert len(workers) == 2
        finally:
            for worker in workers:
                worker.stop()


def test_a_prompt_that_exceeds_a_message() -> None:
    states = torch.zeros(3000, 1024)
    run = PlacedRun(0, 0, torch.arange(len(states)))
    assert len(chunks.encode(Exact(), [run], states, None)) > 1
    with pytest.raises(UnsupportedFeature, match=r"3,000 tokens .* a worker holds 2,048"):
        chunks.encode(Exact(), [run], states, None, whole_runs=True)


def test_what_was_cut_back_cannot_be_rebuilt() -> None:
    history, columns = History(), torch.ones(1, 4, dtype=torch.bool)
    for count in (3, 1, 2):
        history.append(torch.zeros(1, count, 4), torch.arange(count)[None])
    history.crop(4)
    assert [len(states) for _, states, _ in history.replay(columns, by_call=True, indivisible=True)] == [3, 1]
    history.crop(2)
    assert len([*history.replay(columns[:, :2], by_call=True)]) == 1
    with pytest.raises(HistoryLost, match="cut back"):
        next(history.replay(columns[:, :2], by_call=True, indivisible=True))

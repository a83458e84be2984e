"""Nothing is lost when a worker is: the device fills another one's cache and goes on with the same tokens."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import tiny
from fleet import running_broker, start_worker
from split_common.engine.pool import DEFAULT_PAGE_TOKENS, PagePool
from split_common.errors import SessionLost, StepFailed
from split_device import SplitModelForCausalLM
from split_device.sessions.client import PATIENCE
from split_worker.limits import WorkerLimits
from split_worker.worker import Worker
from wiretap import LATE, SOON

pytestmark = pytest.mark.usefixtures("transport", "patient_queue")

PROMPT = torch.tensor([[5, 17, 33, 4, 61, 12, 80, 7, 29, 44]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "suppress_tokens": [0]}
PADDED = torch.tensor([[0, 0, 0, 21, 22, 23], [11, 12, 13, 14, 15, 16]])
MASK = (PADDED != 0).long()
REPEATED = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7, 8]])

MODES: dict[str, Callable[[Any], torch.Tensor]] = {
    "greedy": lambda model: model.generate(PROMPT, **GREEDY),
    "batch": lambda model: model.generate(PADDED, attention_mask=MASK, **GREEDY),
    "beams": lambda model: model.generate(PROMPT, num_beams=4, num_return_sequences=2, **GREEDY),
    "lookup": lambda model: model.generate(REPEATED, prompt_lookup_num_tokens=4, **GREEDY),
}


class Workers:
    """Workers of one checkpoint, of which there is always at least one; `strike` ends the one in use."""

    def __init__(self, checkpoint: Path, broker: str, limits: WorkerLimits | None) -> None:
        self._start = lambda: start_worker(checkpoint, broker, limits=limits)
        self.running: list[Worker] = [self._start()]
        self.ended = 0

    def strike(self) -> None:
        """Ends the workers that hold a session, without a word to anybody, and has another one ready before."""
        holders = [worker for worker in self.running if len(worker._sessions)]
        self.running.append(self._start())
        for worker in holders:
            self.running.remove(worker)
            worker.stop()
            self.ended += 1

    def close(self) -> None:
        for worker in self.running:
            worker.stop()


@contextlib.contextmanager
def fleet_of(checkpoint: Path, limits: WorkerLimits | None = None, **options: Any) -> Iterator[tuple[Any, Workers]]:
    with running_broker() as broker:
        workers = Workers(checkpoint, broker.address, limits)
        try:
            with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address, **options) as model:
                yield model, workers
        finally:
            workers.close()


def strike_at(model: Any, workers: Workers, calls: set[int]) -> None:
    """Ends the worker in use before these calls of the model."""
    count = iter(range(10**6))

    def before(*_: Any) -> None:
        if next(count) in calls:
            workers.strike()

    model.register_forward_pre_hook(before)


@pytest.mark.parametrize(
    ("transport", "arch"),
    [
        ("zmq", "llama"),
        pytest.param("zmq", "gemma2", marks=pytest.mark.long),
        pytest.param("zmq", "gpt2", marks=pytest.mark.nightly),
        pytest.param("redis", "llama", marks=pytest.mark.long),
    ],
    indirect=["transport"],
)
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_the_same_however_often_a_worker_is_lost(arch: str, mode: str, tmp_path: Path) -> None:
    wanted = MODES[mode](tiny.build(arch))
    with fleet_of(tiny.save(arch, tmp_path)) as (model, workers):
        strike_at(model, workers, {2, 4, 5})
        assert torch.equal(MODES[mode](model), wanted)
        assert workers.ended == 3
        assert model.traffic["replays"] == 3


def test_a_conversation_goes_on_without_its_worker(tmp_path: Path) -> None:
    def turns(model: Any, between: Callable[[], None]) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        first = model.generate(PROMPT, past_key_values=cache, **GREEDY)
        between()
        more = torch.cat([first, torch.tensor([[7, 8, 9]])], 1)
        return model.generate(more, past_key_values=cache, **GREEDY)

    wanted = turns(tiny.build("mistral"), lambda: None)
    with fleet_of(tiny.save("mistral", tmp_path)) as (model, workers):
        assert torch.equal(turns(model, workers.strike), wanted)
        assert model.traffic["replays"] == 1


@pytest.mark.parametrize("transport", ["zmq"], indirect=True)
@pytest.mark.parametrize("mode", MODES)
def test_length_dependent_rotary_embeddings_are_replayed_as_they_were(mode: str, tmp_path: Path) -> None:
    """Keys that were cached with short factors stay so, though the sequence has grown long since."""
    config = {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 12,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        }
    }
    wanted = MODES[mode](tiny.build("llama", **config))
    with fleet_of(tiny.save("llama", tmp_path, **config)) as (model, workers):
        strike_at(model, workers, {2, 4, 5})
        assert torch.equal(MODES[mode](model), wanted)
        assert model.traffic["replays"] == 3


def test_a_worker_may_come_back_within_the_patience(tmp_path: Path) -> None:
    wanted = tiny.build("qwen3").generate(PROMPT, **GREEDY)
    checkpoint = tiny.save("qwen3", tmp_path)
    with running_broker() as broker, ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        first = start_worker(checkpoint, broker.address)
        model = stack.enter_context(
            SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address, patience=60.0)
        )
        calls, stopped = iter(range(10**6)), threading.Event()

        def before(*_: Any) -> None:
            if next(calls) == 5:
                first.stop()
                stopped.set()

        model.register_forward_pre_hook(before)
        generation = pool.submit(model.generate, PROMPT, **GREEDY)
        assert stopped.wait(LATE)
        time.sleep(0.5)
        assert not generation.done()
        stack.callback(start_worker(checkpoint, broker.address).stop)
        assert torch.equal(generation.result(LATE), wanted)


def test_a_generation_is_resumed_after_the_patience_has_ended(tmp_path: Path) -> None:
    wanted = tiny.build("llama").generate(PROMPT, **GREEDY)
    with fleet_of(tiny.save("llama", tmp_path), patience=0.3) as (model, workers), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(PROMPT[:, :-1], past_key_values=cache)
        workers.running.pop().stop()
        began = time.monotonic()
        with pytest.raises(SessionLost):
            model.generate(PROMPT, past_key_values=cache, **GREEDY)
        assert time.monotonic() - began < SOON < PATIENCE
        workers.running.append(workers._start())
        assert torch.equal(model.generate(PROMPT, past_key_values=cache, **GREEDY), wanted)


def test_a_step_that_makes_every_worker_fail_is_not_tried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fleet_of(tiny.save("llama", tmp_path)) as (model, workers):
        body = workers.running[0]._body
        monkeypatch.setattr(body, "launch", lambda *_: 1 / 0)
        with pytest.raises(StepFailed, match="ZeroDivisionError"):
            model.generate(PROMPT, **GREEDY)
        assert workers.running[0].counters["refused_failed"] == 2
        monkeypatch.undo()
        assert torch.equal(model.generate(PROMPT, **GREEDY), tiny.build("llama").generate(PROMPT, **GREEDY))


def test_many_sessions_finish_on_a_pool_for_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for a quarter of the sessions: they wait, are evicted and replayed, and all end with their tokens."""
    sessions, room = 32, 8
    prompts = torch.randint(2, 97, (sessions, 40), generator=torch.Generator().manual_seed(0))
    unsplit = tiny.build("llama")
    checkpoint = tiny.save("llama", tmp_path)
    monkeypatch.setattr("fleet.KV_BYTES", _bytes_for(checkpoint, room * (40 + 24)))
    # Admitted as if they did not grow, so that some are evicted.
    limits = WorkerLimits(growth=4)
    with fleet_of(checkpoint, limits, patience=120.0) as (model, workers), ThreadPoolExecutor(sessions) as pool:
        store = workers.running[0]._body.store
        assert isinstance(store, PagePool)
        assert room * 64 <= store.capacity < room * 64 + 2 * DEFAULT_PAGE_TOKENS
        outputs = list(pool.map(lambda prompt: model.generate(prompt[None], **GREEDY), prompts))
        for prompt, output in zip(prompts, outputs, strict=True):
            assert torch.equal(output, unsplit.generate(prompt[None], **GREEDY))
        assert workers.running[0].counters["evictions"] > 0
        assert model.traffic["replays"] > 0


def _bytes_for(checkpoint: Path, tokens: int) -> int:
    with running_broker() as broker:
        worker = start_worker(checkpoint, broker.address)
        try:
            store = worker._body.store
            assert isinstance(store, PagePool)
            held = sum(keys.nbytes + values.nbytes for keys, values in store.layers.values())
            return held * -(-tokens // DEFAULT_PAGE_TOKENS) // store.pages
        finally:
            worker.stop()

"""Where the time goes, when several threads use one model at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import tiny
from fleet import split_model
from split_common.errors import UnsupportedFeature
from split_device import Generator, Request
from split_device.models.body import forwarding
from split_device.sessions.session import RemoteSession
from split_device.sessions.timings import STAGES, StepTimings, Timings

PROMPT = torch.tensor([[5, 17, 33, 4, 61]])

#: Seconds after which a test that hangs fails.
LIMIT = 120


class Clock:
    """Takes the place of the module `time`: each thread has a clock of its own, which moves when it is told to."""

    def __init__(self) -> None:
        self._own = threading.local()

    def perf_counter(self) -> float:
        return getattr(self._own, "now", 0.0)

    def advance(self, seconds: float) -> None:
        self._own.now = self.perf_counter() + seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("split_device.sessions.timings.time", clock)
    return clock


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with split_model(tiny.save("llama", tmp_path_factory.mktemp("llama"))) as model:
        yield model


def test_a_neighbour_does_not_change_a_steps_timings(
    model: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one thread's step is at the worker, another thread's whole step runs, which takes much longer."""
    first = threading.current_thread()
    call = RemoteSession.call

    def spend(quick: float, slow: float) -> None:
        clock.advance(quick if threading.current_thread() is first else slow)

    def forward() -> None:
        with torch.no_grad():
            model(PROMPT)

    def delayed(self: RemoteSession, requests: Any, timings: Any) -> Any:
        replies = call(self, requests, timings)
        if threading.current_thread() is first:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(forward).result(LIMIT)
        spend(2.0, 200.0)
        return replies

    monkeypatch.setattr(RemoteSession, "call", delayed)
    slots = model.split_parts.stack.slots
    hooks = [
        slots[0].register_forward_hook(lambda *_: spend(1.0, 100.0)),
        slots[-1].register_forward_hook(lambda *_: spend(3.0, 300.0)),
    ]
    try:
        model.timings.reset()
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    seconds = model.timings.seconds
    assert model.timings.steps == 2
    assert (seconds["head"], seconds["tail"], seconds["sampling"]) == (101.0, 303.0, 0.0)
    # The worker has its own clock, and what it took is taken off the queue's time.
    assert seconds["queue"] + seconds["body"] + seconds["worker"] == pytest.approx(202.0)


def test_each_step_is_counted_once_whatever_thread_takes_it(model: Any) -> None:
    """A generator runs head and tail by itself: its steps are those of the body alone."""
    model.timings.reset()
    with Generator(model) as generator:
        config = GenerationConfig(max_new_tokens=4, do_sample=False)
        generator.submit(Request(PROMPT[0].tolist(), config)).result(LIMIT)
        assert model.timings.steps == generator.counters["steps"] > 0
    assert model.timings.seconds["body"] > 0


def test_a_refused_step_is_not_counted_and_leaves_nothing_behind(model: Any) -> None:
    model.timings.reset()
    with torch.no_grad(), pytest.raises(UnsupportedFeature):
        model(PROMPT, attention_mask=torch.ones(1, 1, 5, 5))
    assert model.timings.steps == 0
    assert forwarding.get() is None
    with torch.no_grad():
        model(PROMPT)
    assert model.timings.steps == 1
    assert forwarding.get() is None


def test_sums_are_of_all_steps_since_the_last_reset() -> None:
    sums = Timings()
    for seconds in (1.0, 2.0):
        step = StepTimings()
        step.add("body", seconds)
        sums.record(step)
    assert (sums.steps, sums.seconds["body"]) == (2, 3.0)
    assert sums.per_step_ms() == dict.fromkeys(STAGES, 0.0) | {"body": 1500.0}
    sums.reset()
    assert (sums.steps, sums.per_step_ms()) == (0, dict.fromkeys(STAGES, 0.0))

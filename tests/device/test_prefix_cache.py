"""The prefix cache: requests begin with what others have computed, and get the tokens of the unsplit model."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_generator import alone, greedy, sampling
from transformers import AutoModelForCausalLM

import tiny
from fleet import joined, running_broker, split_model, start_worker
from split_device import SplitModelForCausalLM
from split_device.generation.generator import Generator, Request
from split_device.sessions.history import History
from split_worker.limits import WorkerLimits
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


def test_what_is_only_half_computed_is_kept_as_far_as_it_is_complete(
    fleet: tuple[Any, Worker], unsplit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = fleet
    prompt = text(200)
    with Generator(model) as generator:
        tail = generator._tail
        monkeypatch.setattr(tail.scheduler.budget, "tokens", lambda: 32)
        begun = threading.Event()
        forward = tail.forward

        def forward_and_cancel() -> Any:
            rows, outcomes = forward()
            if rows and not outcomes and not begun.is_set():
                begun.set()
                cancelled.cancel()
            return rows, outcomes

        monkeypatch.setattr(tail, "forward", forward_and_cancel)
        cancelled = generator.submit(Request(prompt, greedy(8)))
        assert cancelled.result(LATE) == []
        assert begun.is_set()
        request = Request([*prompt[:150], 5, 6, 7], greedy(8))
        later = generator.submit(request)
        assert later.result(LATE) == alone(unsplit, request)
        assert later.cached_tokens == 32


@pytest.mark.parametrize("drafter", ["off", "ngram"])
def test_what_a_cancelled_request_has_computed_is_kept(
    fleet: tuple[Any, Worker], unsplit: Any, drafter: str
) -> None:
    """Its next step is at the worker by then: that is waited for, and a request meanwhile gets its own tokens."""
    model, worker = fleet
    prompt = text(20) * 3
    with Generator(model, speculate=drafter) as generator:
        cancelled = generator.submit(Request(prompt, greedy(40)), lambda *_: had(5))

        def had(tokens: int) -> None:
            if len(cancelled.tokens) == tokens:
                cancelled.cancel()

        got = cancelled.result(LATE)
        assert cancelled.finish_reason == "cancelled"
        assert got == alone(unsplit, Request(prompt, greedy(len(got))))
        wait_until(lambda: worker.facts()["kept"] == 1)
        later = Request([*prompt, *got, 5, 6], greedy(6))
        generation = generator.submit(later)
        assert generation.result(LATE) == alone(unsplit, later)
        assert generation.cached_tokens >= len(prompt) + 4
        # As long as one is at the worker, it is nobody's to begin with.
        again = [generator.submit(Request(text(30, seed), greedy(40))) for seed in (70, 71)]
        for each in again:
            next(iter(each))
            each.cancel()
    wait_until(lambda: not worker.facts()["sessions"])


def test_a_lost_history_keeps_nobody_waiting_and_nothing_open(
    fleet: tuple[Any, Worker], unsplit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full: other requests cannot begin with what a request holds, and no worker is to keep it."""
    model, worker = fleet
    monkeypatch.setattr(History, "is_lost", True)
    before = worker.facts()["sessions"]
    with Generator(model) as generator:
        shared = text(60, 9)
        first, second = (Request([*shared, last], greedy(tokens)) for last, tokens in ((5, 40), (6, 2)))
        order: list[str] = []
        generations = [
            generator.submit(request, lambda *_, name=name: order.append(name))
            for request, name in ((first, "first"), (second, "second"))
        ]
        for request, generation in zip((first, second), generations, strict=True):
            assert generation.result(LATE) == alone(unsplit, request)
        assert order.index("second") < 30
    wait_until(lambda: worker.facts()["sessions"] <= before)


def test_each_turn_computes_what_is_new(fleet: tuple[Any, Worker], unsplit: Any) -> None:
    model, worker = fleet
    with Generator(model, speculate="off") as generator:
        before = worker.facts()["tokens"]
        seen = conversation(generator, unsplit, 6)
        # All but the last token of each answer has gone through the model.
        assert seen == [(20, 0), *((20 + 13 * turn, 19 + 13 * turn - 5) for turn in range(1, 6))]
        computed = worker.facts()["tokens"] - before
        assert computed == sum(prompt - cached for prompt, cached in seen) + 6 * 7
        # What a later turn has makes what an earlier one left useless.
        wait_until(lambda: worker.facts()["kept"] == worker.facts()["sessions"] == 1)
    wait_until(lambda: not worker.facts()["sessions"])


def test_a_beginning_of_many_is_computed_once(fleet: tuple[Any, Worker], unsplit: Any) -> None:
    model, worker = fleet
    common = text(100)
    asked = [Request([*common, *text(4, seed)], greedy(6)) for seed in range(2, 14)]
    with Generator(model, speculate="off") as generator:
        before = worker.facts()["tokens"]
        generations = [generator.submit(request) for request in asked]
        assert [each.result(LATE) for each in generations] == [alone(unsplit, request) for request in asked]
        assert sorted(each.cached_tokens for each in generations) == [0] + [100] * 11
        assert worker.facts()["tokens"] - before == 100 + 12 * (4 + 5)
        later = generator.submit(asked[3])
        assert later.result(LATE) == alone(unsplit, asked[3])
        assert later.cached_tokens == 103
    wait_until(lambda: not worker.facts()["sessions"])


def test_a_short_common_beginning_goes_first(fleet: tuple[Any, Worker], unsplit: Any) -> None:
    """The others do not wait for the long rest of the first one."""
    model, worker = fleet
    asked = [Request([*text(30), index, *text(80, index)], greedy(3)) for index in range(3, 7)]
    submitted = threading.Event()
    with Generator(model, speculate="off") as generator:
        before = worker.facts()["tokens"]
        # It holds the generator up until all have come.
        generator.submit(Request([5, 6, 7], greedy(1)), lambda *_: submitted.wait(LATE))
        generations = [generator.submit(request) for request in asked]
        submitted.set()
        assert [each.result(LATE) for each in generations] == [alone(unsplit, request) for request in asked]
        assert sorted(each.cached_tokens for each in generations) == [0, 30, 30, 30]
        assert worker.facts()["tokens"] - before == 3 + 30 + 4 * (81 + 2)


def test_sampling_and_choices_of_one_prompt(fleet: tuple[Any, Worker], unsplit: Any) -> None:
    """A seed gives the same tokens, whether its prompt was computed before or not."""
    model, _ = fleet
    asked = [Request(text(40), sampling(10), seed=seed, index=seed) for seed in range(4)]
    with Generator(model) as generator:
        for _ in range(2):
            generations = [generator.submit(request) for request in asked]
            assert [each.result(LATE) for each in generations] == [alone(unsplit, request) for request in asked]
        assert {each.cached_tokens for each in generations} == {39}


def test_a_device_with_little_memory_keeps_what_fits(fleet: tuple[Any, Worker], unsplit: Any) -> None:
    model, worker = fleet
    asked = [Request(text(40, seed), greedy(10)) for seed in [*range(8), *range(8)]]
    # 8 pages of 16 tokens: one request takes 4, and no more than one is kept beside another.
    page = 16 * 4 * 2 * 2 * 8 * 4
    with Generator(model, kv_memory=8 * page) as generator:
        generations = [generator.submit(request) for request in asked]
        assert [each.result(LATE) for each in generations] == [alone(unsplit, request) for request in asked]
        assert conversation(generator, unsplit, 4)[1:] == [(33, 27), (46, 40), (59, 53)]
    # Keys and values of four layers, and a state, of 60 tokens.
    with Generator(model, prefix_cache=60 * (page // 16 + 32 * 4)) as generator:
        for request in asked:
            assert generator.submit(request).result(LATE) == alone(unsplit, request)
            wait_until(lambda: worker.facts()["kept"] == 1)
    with Generator(model, prefix_cache=0) as generator:
        assert {cached for _, cached in conversation(generator, unsplit, 2)} == {0}
        wait_until(lambda: not worker.facts()["sessions"])


@pytest.mark.parametrize(
    "limits",
    [WorkerLimits(max_sessions=2), WorkerLimits(kept_tokens=30), WorkerLimits(kept_tokens=0)],
    ids=["few sessions", "few tokens", "none"],
)
def test_a_worker_that_keeps_little(limits: WorkerLimits, llama: Path, unsplit: Any) -> None:
    with running_broker() as broker:
        worker = start_worker(llama, broker.address, limits=limits)
        try:
            with SplitModelForCausalLM.from_pretrained(llama, broker=broker.address) as model:
                with Generator(model, max_requests=2) as generator:
                    for seed in (1, 50, 1, 50):
                        conversation(generator, unsplit, 2, seed)
                    assert worker.facts()["kept"] <= {None: 2, 30: 1, 0: 0}[limits.kept_tokens]
                assert model.traffic["replays"] == (
                    0 if limits.kept_tokens == 0 else model.traffic["missed_copies"]
                )
        finally:
            worker.stop()


def test_a_request_that_waits_for_room_is_not_overtaken(llama: Path, unsplit: Any) -> None:
    with running_broker() as broker:
        worker = start_worker(llama, broker.address, limits=WorkerLimits(max_sessions=2))
        try:
            with (
                SplitModelForCausalLM.from_pretrained(llama, broker=broker.address) as model,
                Generator(model, max_requests=8) as generator,
            ):
                # The first two go on for as long as the others are looked at.
                asked = [Request(text(20, seed), greedy(tokens)) for seed, tokens in enumerate((220, 220, 10, 10))]
                running = [generator.submit(request) for request in asked[:2]]
                assert [next(iter(each)) for each in running]
                waiting = generator.submit(asked[2])
                wait_until(
                    lambda: waiting in generator._active and generator._active[waiting].session.waits_for_room
                )
                later = generator.submit(asked[3])
                seen = generator.counters["tokens"]
                wait_until(lambda: generator.counters["tokens"] >= seen + 6)
                assert later.session is None
                assert generator._active[waiting].session.waits_for_room
                answers = [each.result(LATE) for each in (*running, waiting, later)]
                assert answers == [alone(unsplit, request) for request in asked]
        finally:
            worker.stop()


def test_a_worker_that_is_gone_and_what_it_kept(llama: Path, unsplit: Any) -> None:
    with (
        running_broker() as broker,
        joined(broker.address, llama) as (model, worker),
        Generator(model) as generator,
    ):
        assert [cached for _, cached in conversation(generator, unsplit, 2)] == [0, 27]
        other = start_worker(llama, broker.address)
        try:
            worker.stop()
            # What was kept there is computed again, and kept here.
            assert [cached for _, cached in conversation(generator, unsplit, 3)] == [0, 27, 40]
            wait_until(lambda: other.facts()["kept"] == 1)
        finally:
            other.stop()


def test_requests_that_may_not_share(fleet: tuple[Any, Worker], unsplit: Any) -> None:
    """A higher priority does not wait for a lower one; and the first one may end before others have begun."""
    model, _ = fleet
    prompt = text(60)
    with Generator(model) as generator:
        generations = [
            generator.submit(Request([*prompt, 5], greedy(5), priority=level)) for level in (0, 0, 2, 1, 3)
        ]
        generations[0].cancel()
        wanted = alone(unsplit, Request([*prompt, 5], greedy(5)))
        assert [each.result(LATE) for each in generations[1:]] == [wanted] * 4
        assert generations[0].result(LATE) == wanted[: len(generations[0].tokens)]


@pytest.mark.parametrize("arch", ["gemma2", "qwen2_sw", "falcon"])
def test_windows_and_sequences_that_are_not_packed(arch: str, tmp_path: Path) -> None:
    checkpoint = tiny.save(arch, tmp_path / arch)
    full = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    common = text(40)
    asked = [Request([*common, *text(3, seed)], greedy(6)) for seed in range(2, 6)]
    with split_model(checkpoint) as model, Generator(model) as generator:
        generations = [generator.submit(request) for request in asked]
        assert [each.result(LATE) for each in generations] == [alone(full, request) for request in asked]
        assert sorted(each.cached_tokens for each in generations) == [0, 40, 40, 40]
        assert [cached for _, cached in conversation(generator, full, 3, 70)] == [0, 27, 40]

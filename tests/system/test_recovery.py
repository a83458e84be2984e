"""Workers that hang, die at a step or are too slow are left; what they say late is dropped."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fleet import running_broker, start_worker
from split_common.cli import main
from split_common.errors import StepFailed, WorkerFailed
from split_common.system.files import state_dir
from split_common.transport import HEARTBEAT, MISSED
from split_device import SplitModelForCausalLM
from split_device.sessions import dead_letters
from split_device.sessions.client import STEP_TIMEOUT
from split_device.sessions.dead_letters import DeadLetter
from split_worker import watchdog
from split_worker.limits import WorkerLimits
from split_worker.watchdog import FIRST_TURN, Watchdog
from split_worker.worker import Worker
from wiretap import LATE, SOON, wait_until

PROMPT = torch.tensor([[5, 17, 33, 4, 61, 12, 80, 7, 29, 44]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "suppress_tokens": [0]}

pytestmark = pytest.mark.usefixtures("patient_queue")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def wanted() -> torch.Tensor:
    output: torch.Tensor = tiny.build("llama").generate(PROMPT, **GREEDY)
    return output


@pytest.fixture(autouse=True)
def _no_letters() -> None:
    dead_letters.clear()


def holder(workers: list[Worker]) -> Worker:
    """The worker that holds the session."""
    (worker,) = (worker for worker in workers if len(worker._sessions))
    return worker


def at_call(model: Any, number: int, act: Callable[[], None]) -> None:
    """Does something before the model's call of this number."""
    calls = iter(range(10**6))
    model.register_forward_pre_hook(lambda *_: act() if next(calls) == number else None)


#: Seconds after which what hangs goes on at the latest.
HANGS = 60.0


def hang(worker: Worker, until: threading.Event, then: Callable[[], None] = lambda: None) -> None:
    """Makes a worker's next forward wait, as one that hangs does."""
    forward = worker._compute._launch

    def wait(batch: Any) -> Any:
        then()
        until.wait(HANGS)
        worker._compute._launch = forward  # type: ignore[method-assign]
        return forward(batch)

    worker._compute._launch = wait  # type: ignore[method-assign]


def test_a_worker_that_hangs_is_left_and_what_it_says_late_is_dropped(
    checkpoint: Path, wanted: torch.Tensor
) -> None:
    """Its link goes on: it is the worker itself that notices, and says that it serves no more."""
    with running_broker() as broker:
        workers = [start_worker(checkpoint, broker.address) for _ in range(2)]
        broker._started -= 100
        release, hung_at, found_at = threading.Event(), [0.0], [0.0]
        try:
            with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address) as model:
                zombies: list[Worker] = []

                def strike() -> None:
                    zombies.append(holder(workers))
                    hang(zombies[0], release, lambda: hung_at.__setitem__(0, time.monotonic()))

                at_call(model, 6, strike)
                at_call(model, 7, lambda: found_at.__setitem__(0, time.monotonic()))
                # Comes back in mid-generation, with a reply to a step that was answered elsewhere long ago.
                at_call(model, 8, release.set)
                at_call(model, 9, lambda: time.sleep(1.5 * HEARTBEAT))
                assert torch.equal(model.generate(PROMPT, **GREEDY), wanted)
                assert model.traffic["replays"] == 1
                # Long before the device would have looked for a faster one.
                assert found_at[0] - hung_at[0] < HEARTBEAT * (MISSED + 1) + SOON < STEP_TIMEOUT
                (zombie,) = zombies
                wait_until(lambda: not len(zombie._sessions) and zombie._body.store.free_tokens > 0)
                wait_until(lambda: zombie._body.store.free == zombie._body.store.pages)  # type: ignore[attr-defined]
                assert zombie.counters["hung"] == 1
                # It serves again.
                workers[1 - workers.index(zombie)].stop()
                assert torch.equal(model.generate(PROMPT, **GREEDY), wanted)
        finally:
            release.set()
            for worker in workers:
                worker.stop()


def test_a_long_prefill_and_a_first_forward_have_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    watch = Watchdog(FIRST_TURN, WorkerLimits().hung_after)

    def overdue_after(tokens: int, seconds: float) -> bool:
        nonlocal now
        watch.begin(tokens)
        now += seconds
        overdue = watch.overdue() > 0
        watch.end()
        return overdue

    assert not watch.overdue()
    assert not overdue_after(1, 0.1)
    assert not overdue_after(1, 2.9)
    assert overdue_after(1, 13.0)
    for _ in range(200):
        assert not overdue_after(1, 0.05)
    assert overdue_after(1, 3.1)
    for _ in range(200):
        assert not overdue_after(1, 0.05)
    assert not overdue_after(512, 60.0)
    assert not watch.overdue()


def a_dead_gpu(_: object) -> None:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("where", "failure", "name"),
    [
        ("_compute._scheduler.next_batch", lambda: 1 / 0, "ZeroDivisionError"),
        ("_compute._begin", a_dead_gpu, "AcceleratorError"),
    ],
)
def test_a_compute_loop_that_fails_takes_its_worker_out_of_the_queue(
    where: str, failure: Any, name: str, checkpoint: Path, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_broker() as broker:
        workers = [start_worker(checkpoint, broker.address) for _ in range(2)]
        told: list[Worker] = []
        try:
            with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address) as model:

                def strike() -> None:
                    bad = holder(workers)
                    bad._on_failure = lambda: told.append(bad)
                    owner, _, attribute = where.rpartition(".")
                    monkeypatch.setattr(attrgetter(owner)(bad), attribute, failure)

                at_call(model, 5, strike)
                began = time.monotonic()
                assert torch.equal(model.generate(PROMPT, **GREEDY), wanted)
                assert time.monotonic() - began < SOON < STEP_TIMEOUT
                assert model.traffic["replays"] == 1
                wait_until(lambda: told)
                (bad,) = told
                with pytest.raises(WorkerFailed, match=name):
                    bad.check()
                assert [peer.role for peer in list(broker._peers.values())].count("worker") == 1
        finally:
            for worker in workers:
                worker.stop()


FAILING = """
import sys
from split_common.engine.scheduler import Scheduler
add = Scheduler.add
Scheduler.add = lambda *args: 1 / 0
from split_common.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_worker_process_whose_compute_loop_fails_ends_with_one_line(checkpoint: Path) -> None:
    with (
        running_broker() as broker,
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                FAILING,
                "worker",
                "--model",
                str(checkpoint),
                "--broker",
                broker.address,
                "--json",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert json.loads(process.stdout.readline())["pid"] == process.pid
            with (
                SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address, patience=0.0) as model,
                pytest.raises(Exception, match="gone"),
            ):
                model.generate(PROMPT, **GREEDY)
            assert process.wait(LATE) == 1
            loading, *lines = process.stderr.read().splitlines()
            assert loading.startswith("loading ")
            assert len(lines) == 1
            assert lines[0].startswith("error: the compute loop failed with an unforeseen ZeroDivisionError")
        finally:
            process.kill()


def test_a_worker_that_hangs_can_be_ended(checkpoint: Path) -> None:
    begun, release = threading.Event(), threading.Event()
    with running_broker() as broker, ThreadPoolExecutor(1) as pool:
        worker = start_worker(checkpoint, broker.address, limits=WorkerLimits(hung_after=0.5))
        with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address, patience=0.0) as model:
            model.generate(PROMPT, **GREEDY)
            hang(worker, release, begun.set)
            work = pool.submit(model.generate, PROMPT, **GREEDY)
            assert begun.wait(LATE)
            began = time.monotonic()
            worker.stop()
            # Before the forward ends by itself.
            assert time.monotonic() - began < SOON < HANGS
            release.set()
            assert work.exception(LATE) is not None


# --- too slow ----------------------------------------------------------------------------------------------

#: Limits of workers that do not count as hung.
PATIENT = WorkerLimits(hung_after=100.0)


def hurry(model: Any, number: int) -> None:
    """Makes the device look for a faster worker soon, in this one call of the model."""
    at_call(model, number, lambda: setattr(model._client, "step_timeout", 0.3))
    at_call(model, number + 1, lambda: setattr(model._client, "step_timeout", STEP_TIMEOUT))


def test_a_worker_that_is_too_slow_is_left_for_another_one(checkpoint: Path, wanted: torch.Tensor) -> None:
    release = threading.Event()
    with running_broker() as broker:
        workers = [start_worker(checkpoint, broker.address, limits=PATIENT) for _ in range(2)]
        try:
            with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address) as model:
                at_call(model, 6, lambda: hang(holder(workers), release))
                hurry(model, 6)
                at_call(model, 7, release.set)
                began = time.monotonic()
                assert torch.equal(model.generate(PROMPT, **GREEDY), wanted)
                assert time.monotonic() - began < SOON < HANGS
                assert model.traffic["replays"] == 1
                wait_until(lambda: not any(len(worker._sessions) for worker in workers))
        finally:
            release.set()
            for worker in workers:
                worker.stop()


def test_the_only_worker_may_take_its_time(checkpoint: Path, wanted: torch.Tensor) -> None:
    release = threading.Event()
    with running_broker() as broker:
        worker = start_worker(checkpoint, broker.address, limits=PATIENT)
        try:
            with SplitModelForCausalLM.from_pretrained(
                checkpoint, broker=broker.address, step_timeout=0.3
            ) as model:
                at_call(model, 6, lambda: hang(worker, release))
                timer = threading.Timer(2.0, release.set)
                timer.start()
                assert torch.equal(model.generate(PROMPT, **GREEDY), wanted)
                assert model.traffic["replays"] == 0
        finally:
            release.set()
            worker.stop()


def test_a_step_does_not_wander_between_slow_workers(checkpoint: Path, wanted: torch.Tensor) -> None:
    release = threading.Event()
    with running_broker() as broker:
        workers = [start_worker(checkpoint, broker.address, limits=PATIENT) for _ in range(2)]
        try:
            with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address) as model:
                slow = threading.Semaphore(len(workers) - 1)

                def go_on_soon() -> None:
                    if not slow.acquire(blocking=False):
                        threading.Timer(1.5, release.set).start()

                def slow_down() -> None:
                    for worker in workers:
                        hang(worker, release, go_on_soon)

                at_call(model, 6, slow_down)
                hurry(model, 6)
                assert torch.equal(model.generate(PROMPT, **GREEDY), wanted)
                assert model.traffic["replays"] == 1
        finally:
            release.set()
            for worker in workers:
                worker.stop()


def test_a_full_queue_pushes_back_and_nothing_is_lost(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = torch.randint(2, 97, (1, 200), generator=torch.Generator().manual_seed(0))
    expected = tiny.build("llama").generate(prompt, **GREEDY)
    # Chunks of four tokens, of which the queue holds three with what a request counts beside its tensor.
    monkeypatch.setattr("split_device.sessions.chunks.CHUNK_BYTES", 512)
    limits = WorkerLimits(max_queued_bytes=4700, full_retry=0.01)
    with running_broker() as broker:
        worker = start_worker(checkpoint, broker.address, limits=limits)
        try:
            with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address) as model:
                at_once = threading.Event()
                at_once.set()
                hang(worker, at_once, lambda: wait_until(lambda: worker.counters["refused_full"] > 3))
                assert torch.equal(model.generate(prompt, **GREEDY), expected)
                assert model.traffic["replays"] == 0
        finally:
            worker.stop()


# --- poison ------------------------------------------------------------------------------------------------


def test_a_step_that_makes_workers_fail_is_recorded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_broker() as broker:
        workers = [start_worker(checkpoint, broker.address) for _ in range(2)]
        try:
            with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address) as model:
                for worker in workers:
                    monkeypatch.setattr(worker._body, "launch", lambda *_: 1 / 0)
                with pytest.raises(StepFailed, match="ZeroDivisionError"):
                    model.generate(PROMPT.repeat(2, 1) + torch.tensor([[0], [1]]), **GREEDY)
                assert [worker.counters["refused_failed"] for worker in workers] == [1, 1]
        finally:
            for worker in workers:
                worker.stop()
    path = state_dir() / "dead-letters.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (letter,) = dead_letters.read()
    assert (letter.layers, members(letter), letter.rows) == ("2:4", ["worker-1", "worker-1"], 2)
    assert (letter.tokens, letter.cached) == (20, 0)
    assert "ZeroDivisionError" in letter.reason
    assert set(json.loads(path.read_text())) == {
        *("time", "model", "layers", "workers", "rows", "tokens", "cached", "reason", "request_id", "session")
    }
    assert main(["dead-letters"]) == 0
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert main(["dead-letters", "--json", "--clear"]) == 0
    assert len(json.loads(capsys.readouterr().out)["dead_letters"]) == 1
    assert main(["dead-letters", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"dead_letters": []}
    assert not path.exists()


def members(letter: DeadLetter) -> list[str]:
    """The members of the workers in a dead letter; each process has a name of its own."""
    return [name.partition("/")[0] for name in letter.workers]


def die_when(worker: Worker, condition: Callable[[Any], bool]) -> None:
    """Has a worker die at a forward whose batch meets a condition, as its process would: without a reply."""
    forward = worker._compute._launch

    def launch(batch: Any) -> Any:
        if condition(batch):
            worker._transport.close()
            raise SystemExit
        return forward(batch)

    worker._compute._launch = launch  # type: ignore[method-assign]


def test_a_step_that_kills_workers_does_not_travel_for_ever(checkpoint: Path, wanted: torch.Tensor) -> None:
    with running_broker() as broker:
        workers = [start_worker(checkpoint, broker.address) for _ in range(5)]

        try:
            for worker in workers:
                die_when(worker, lambda batch: any(chunk.run.cost == 3 for chunk in batch))
            with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address) as model:
                with pytest.raises(StepFailed, match="4 workers died"):
                    model.generate(PROMPT[:, :3], **GREEDY)
                # Another one goes on where it was.
                assert torch.equal(model.generate(PROMPT, **GREEDY), wanted)
        finally:
            for worker in workers:
                worker.stop()
    (letter,) = dead_letters.read()
    assert (members(letter), letter.tokens) == (["worker-1"] * 4, 3)


def test_workers_that_die_while_they_are_told_the_history(checkpoint: Path, wanted: torch.Tensor) -> None:
    """The step itself never reached the second one and those after it: it is not to blame."""
    deaths = 0

    def dies(batch: Any) -> bool:
        nonlocal deaths
        begins = [chunk.run.positions[0] for chunk in batch]
        if max(begins) > 24 if not deaths else deaths < 6 and 0 in begins:
            deaths += 1
            return True
        return False

    with running_broker() as broker:
        workers = [start_worker(checkpoint, broker.address) for _ in range(7)]
        try:
            for worker in workers:
                die_when(worker, dies)
            with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address) as model:
                assert torch.equal(model.generate(PROMPT, **GREEDY), wanted)
                assert model.traffic["replays"] == 1
        finally:
            for worker in workers:
                worker.stop()
    assert deaths == 6
    assert dead_letters.read() == []


def test_workers_that_die_while_they_hold_many_steps(checkpoint: Path, wanted: torch.Tensor) -> None:
    """Nothing but the number of steps tells that none of them is to blame."""
    deaths = 0

    def dies(worker: Worker) -> bool:
        nonlocal deaths
        if deaths < 6:
            wait_until(lambda: len(worker._sessions) == 8)
            deaths += 1
            return True
        return False

    with running_broker() as broker:
        workers = [start_worker(checkpoint, broker.address) for _ in range(7)]
        try:
            for worker in workers:
                die_when(worker, lambda _, worker=worker: dies(worker))
            with (
                SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address) as model,
                ThreadPoolExecutor(8) as threads,
            ):
                for answer in threads.map(lambda _: model.generate(PROMPT, **GREEDY), range(8)):
                    assert torch.equal(answer, wanted)
        finally:
            for worker in workers:
                worker.stop()
    assert deaths == 6
    assert dead_letters.read() == []


def test_letters_are_kept_apart_from_what_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    letter = dead_letters.DeadLetter(
        model="m", layers="1:2", workers=["w"], rows=1, tokens=1, cached=0, reason="x" * 10_000
    )
    dead_letters.record(letter)
    with (state_dir() / "dead-letters.jsonl").open("a") as file:
        file.write("damaged\n")
    dead_letters.record(letter)
    assert [len(found.reason) for found in dead_letters.read()] == [dead_letters.MAX_REASON] * 2


def test_a_letter_that_cannot_be_written_is_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "file" / "state"))
    dead_letters.record(
        dead_letters.DeadLetter(model="m", layers="1:2", workers=[], rows=1, tokens=1, cached=0, reason="why")
    )
    assert "why" in caplog.text
    assert "could not be recorded" in caplog.text
    assert main(["dead-letters"]) == 2

"""The runner of jobs in itself: what a signal in the middle of a write leaves in the store."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import pytest

from split_device.generation.limits import Limits
from split_device.generation.settings import Sampling
from split_device.jobs.execution import JobExecution
from split_device.jobs.job import Job, Message, ModelChoice, Task, TextPiece, Update
from split_device.jobs.models import Models
from split_device.jobs.runner import JobRunner
from split_device.jobs.store import Store


class InterruptedStore(Store):
    """Ctrl-C is pressed when its write is done, and nobody knows of it yet."""

    def write(self, updates: Iterable[Update]) -> None:
        super().write(updates)
        signal.raise_signal(signal.SIGINT)


class Counting(JobExecution):
    """Generates the tokens 1, 2, 3; Ctrl-C is pressed when one is taken, and is not in `update` yet."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._tokens = iter((1, 2, 3))
        self._cancelled = False

    @property
    def done(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        self._cancelled = True

    def collect(self) -> bool:
        for token in self._tokens:
            signal.raise_signal(signal.SIGINT)
            self.update.piece = TextPiece([*self.update.piece.tokens, token], "")
        return True

    def conclude(self) -> None:
        self.record_interruption()


class CountingRunner(JobRunner):
    def _begin(self, job: Job) -> JobExecution:
        return Counting(job)


class NoModels:
    limits = Limits()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_within_a_write_neither_doubles_nor_loses_tokens(tmp_path: Path, ctrl_c: None) -> None:
    with InterruptedStore(tmp_path / "jobs.db") as store:
        task = Task(model=ModelChoice(name="tiny"), prompt=(Message("user", "Hi"),), sampling=Sampling())
        (job,) = store.submit_all([(task, 0, None)])
        runner = CountingRunner(store, cast(Models, NoModels()), give_up=0.0)
        runner.begin()
        with pytest.raises(KeyboardInterrupt):
            runner.write()
        with pytest.raises(KeyboardInterrupt):
            runner.stop()
    with Store(tmp_path / "jobs.db") as store:
        assert store.progress(job.id).tokens == [1, 2, 3]
        assert store.get(job.id).state == "queued"

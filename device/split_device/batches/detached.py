"""Batches that the agent answers, beside its jobs and with the same models."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from split_common.errors import JobsError, SplitError
from split_common.system.lock import Held, holding
from split_common.system.signals import delay_signals
from split_device.batches.finish import clear, finish
from split_device.batches.pictures import Pictures
from split_device.batches.place import Place, Record, places
from split_device.batches.plan import Plan
from split_device.batches.work import counts
from split_device.jobs.job import JobKind
from split_device.jobs.models import Models
from split_device.jobs.runner import JobRunner
from split_device.jobs.store import Store

log = logging.getLogger(__name__)

#: Interval between two looks for batches that were handed over, in seconds.
LOOK_INTERVAL = 1.0


class _Open:
    """A batch that the agent works on.

    Args:
        runner: makes what runs the jobs of its store.

    Raises:
        Held: another process works on it.
        SplitError: it cannot be opened.
    """

    def __init__(
        self, place: Place, record: Record, runner: Callable[[Store], JobRunner], store_key: Path | None
    ) -> None:
        self.place = place
        #: Number of errors among the answers that are written; None while the batch is not done.
        self._errors: int | None = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(holding(place.lock, remove=True))
            # Whoever held the lock before may have changed it.
            self.record = place.record() or record
            if not (place.store.exists() and place.plan.exists()):
                raise JobsError(f"its files beside {place.store} are gone: run its command again")
            # When the store is closed, and while the lock is held.
            stack.callback(self._clear)
            self.store = stack.enter_context(Store(place.store, store_key))
            self.store.recover()
            self.plan = Plan(place.plan, self.store)
            self.runner = runner(self.store)
            directory = self.record.output_dir
            self.pictures = None if directory is None else Pictures(Path(directory), self.plan, self.store)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Interrupts what runs, and lets go of the batch."""
        try:
            self.runner.stop()
        finally:
            self._stack.close()

    def conclude(self) -> bool:
        """Writes what is done; returns whether that is all. Raises ConfigError if a file cannot be written."""
        if self.pictures is not None:
            self.pictures.write()
        if counts(self.store)[0] < self.record.jobs:
            return False
        # A signal that comes now does not part the files from the record of them.
        with delay_signals():
            summary = finish(self.place, self.record, self.plan, self.store)
            self._errors = summary.errors
        log.info("%s is finished, with %d errors", self.place.name, summary.errors)
        return True

    def _clear(self) -> None:
        if self._errors is not None:
            clear(self.place, self.record, self._errors)


class DetachedBatches:
    """All batches that were handed to the agent.

    Args:
        models, give_up, notice, progressed: as for `JobRunner`.
        store_key: the file of the key that seals their stores; None if they are not sealed.
    """

    def __init__(
        self,
        models: Models,
        give_up: float,
        store_key: Path | None,
        notice: Callable[[str], None],
        progressed: Callable[[], None],
    ) -> None:
        self._runner: Callable[[Store], JobRunner] = lambda store: JobRunner(
            store, models, give_up, notice, progressed
        )
        self._store_key = store_key
        self._open: dict[str, _Open] = {}
        #: Names of batches that cannot be worked on, until their command runs again.
        self._refused: set[str] = set()
        self._look_at = 0.0

    def begin(self, busy: Counter[JobKind]) -> None:
        """Looks for new batches, and starts lines where there is room.

        Args:
            busy: how many jobs run already; `begin` adds to it.
        """
        if time.monotonic() >= self._look_at:
            self._look()
            self._look_at = time.monotonic() + LOOK_INTERVAL
        for each in self._open.values():
            each.runner.begin(busy)
            busy.update(each.runner.running)

    def write(self) -> None:
        """Writes the progress of all batches, and the answers of those that are done."""
        for name, each in list(self._open.items()):
            each.runner.write()
            try:
                done = each.conclude()
            except SplitError as error:
                self._refuse(each.place, each.record, error)
                done = True
            if done:
                del self._open[name]
                each.close()

    def stop(self) -> None:
        """Interrupts all lines that run; the next agent goes on with them."""
        for each in self._open.values():
            each.close()
        self._open.clear()

    def _look(self) -> None:
        for place, record in places():
            name = place.name
            if not record.detached or record.finished is not None or name in self._open:
                continue
            if record.problem is not None and name in self._refused:
                continue
            try:
                self._open[name] = _Open(place, record, self._runner, self._store_key)
            except Held:
                continue
            except SplitError as error:
                self._refuse(place, record, error)

    def _refuse(self, place: Place, record: Record, error: SplitError) -> None:
        """Notes why a batch cannot be worked on; the next agent tries again, or this one after the command."""
        log.error("%s cannot go on: %s", place.name, type(error).__name__)
        self._refused.add(place.name)
        place.write(msgspec.structs.replace(record, problem=str(error)))

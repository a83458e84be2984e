"""Batches as users see them: how far they are, and what they can do with one that is not done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from split_common.errors import JobsError, SplitError
from split_common.system.lock import Held, holding
from split_common.system.times import iso_time
from split_device.batches.finish import clear, finish
from split_device.batches.place import Place, Record, find_batch
from split_device.batches.plan import Plan
from split_device.batches.work import counts
from split_device.jobs.job import Selection
from split_device.jobs.store import Store


def batch_facts(place: Place, record: Record, store_key: Path | None) -> dict[str, Any]:
    """A batch's facts for programs: everything except prompts and answers.

    `done`, `failed` and `cancelled` count answers. They and `tokens` are None if the store is sealed under another
    key, and `tokens` is also None if the store is gone.
    """
    done: int | None = record.jobs
    failed: int | None = record.errors
    cancelled: int | None = 0
    tokens: int | None = None
    if place.store.exists():
        try:
            with Store(place.store, store_key) as store:
                done, failed = counts(store)
                cancelled = store.count()["cancelled"]
                tokens = store.generated()
        except SplitError:
            done = failed = cancelled = None
    return {
        "name": place.name,
        "state": place.state(record),
        "source": record.source,
        "output": record.output,
        "output_dir": record.output_dir,
        "lines": record.lines,
        "answers": record.jobs,
        "done": done,
        "failed": failed,
        "cancelled": cancelled,
        "tokens": tokens,
        "errors": record.errors,
        "detached": record.detached,
        "problem": record.problem,
        "created_at": iso_time(record.created),
        "finished_at": iso_time(record.finished),
    }


@contextlib.contextmanager
def opened(name: str, store_key: Path | None) -> Iterator[tuple[Place, Record, Plan, Store]]:
    """A batch that has its store still.

    Raises:
        UnknownJob: there is no such batch.
        JobsError: all its answers are written, and the store is gone.
        StoreLocked: the store is sealed under another key.
    """
    place, record = find_batch(name)
    if not place.store.exists():
        raise JobsError(f"{name} has ended: its answers are in {record.output}")
    with Store(place.store, store_key) as store:
        yield place, record, Plan(place.plan, store), store


def cancel(name: str, store_key: Path | None) -> None:
    """Cancels the lines of a batch that are not answered. Its files are written with the answers so far.

    The process that works on it does that, or else this one.

    Raises:
        JobsError: there is no such batch, or it has ended.
    """
    with opened(name, store_key) as (place, record, plan, store):
        if record.finished is not None:
            raise JobsError(f"{name} has ended already")
        for id_ in store.ids(Selection(states=("queued", "running"))):
            # It may have ended meanwhile.
            with contextlib.suppress(JobsError):
                store.cancel(id_)
        try:
            with holding(place.lock, remove=True):
                if (record := place.record() or record).finished is not None:
                    # The agent was faster.
                    return
                store.recover()
                errors = finish(place, record, plan, store).errors
                store.close()
                clear(place, record, errors)
        except Held:
            return

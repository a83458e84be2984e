"""A batch: lines become jobs in a store of its own. If the process is killed, a rerun goes on with them.

Lines and answers may be larger than memory: they are on disk, and one line at a time is here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from split_device.batches.lines import Line
from split_device.batches.place import Place
from split_device.batches.plan import Plan, PlanWriter
from split_device.jobs.job import FINAL
from split_device.jobs.store import Store

#: Lines become jobs in transactions of about this size, in bytes, and of this number of lines at most.
SLICE_BYTES = 4 * 1024**2
SLICE_LINES = 256


@dataclass(frozen=True)
class Prepared:
    """A batch whose lines are jobs: its plan, and the numbers of its lines and jobs.

    `dropped` answers of an earlier run were to other lines, or with other settings.
    """

    plan: Plan
    lines: int
    jobs: int
    dropped: int


def counts(store: Store) -> tuple[int, int]:
    """How many jobs of a batch's store have ended, and how many of them have failed."""
    found = store.count()
    return sum(found[state] for state in FINAL), found["failed"]


def prepare(lines: Iterable[Line], place: Place, store: Store) -> Prepared:
    """Makes jobs of lines, unless they are in the store from an earlier run.

    Jobs that failed or were cancelled run again: the cause may be gone. Jobs of lines that are no longer there are
    removed.
    """
    count = jobs = 0
    with PlanWriter(place.plan, store) as writer:
        for some in slices(lines):
            wanted = [(task, 0, key) for line in some for task, key in zip(line.tasks, line.keys(), strict=True)]
            ids = iter(store.submit_ids(wanted))
            for line in some:
                own = tuple(itertools.islice(ids, len(line.tasks)))
                writer.add(msgspec.structs.replace(line.entry, jobs=own))
            count += len(some)
            jobs += len(wanted)
        plan = writer.commit()
    answered = store.count()["succeeded"]
    store.keep(id_ for entry in plan.entries() for id_ in entry.jobs)
    store.retry_unsuccessful()
    return Prepared(plan, count, jobs, answered - store.count()["succeeded"])


def slices(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Lines in lists, each for one transaction."""
    some: list[Line] = []
    size = 0
    for line in lines:
        some.append(line)
        size += line.size
        if len(some) == SLICE_LINES or size >= SLICE_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some

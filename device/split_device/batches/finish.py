"""The end of a batch: its files are written, and what is on disk for it is kept only as long as it is needed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from split_common.errors import ConfigError
from split_common.system.lock import Held, holding
from split_device.batches.done import note_done
from split_device.batches.outputs import write_results
from split_device.batches.pictures import Pictures
from split_device.batches.place import Place, Record, batches_dir, digest_of, has_written, now, places, stamp
from split_device.batches.plan import Plan
from split_device.batches.results import Summary, results
from split_device.jobs.store import Store


def finish(place: Place, record: Record, plan: Plan, store: Store) -> Summary:
    """Writes all answers, and notes it in the record.

    The caller holds the lock, and calls `clear` when the store is closed.

    Raises:
        ConfigError: a file cannot be written, or the file of answers is not as the batch found or left it.
    """
    output = Path(record.output)
    if stamp(output) is not None and not has_written(record, output):
        raise ConfigError(
            f"{output} was written by something else meanwhile, and is not replaced. Remove it and give the same "
            f"command, or write the answers elsewhere: `lambda-split jobs result {place.name} -o FILE`"
        )
    if record.output_dir is not None:
        Pictures(Path(record.output_dir), plan, store).write()
    summary = write_results(
        output,
        record.output_form,
        results(plan, store),
        # A process that is killed before it notes the end leaves a file that is known by this.
        lambda content: place.write(msgspec.structs.replace(record, writing=digest_of(content))),
    )
    note_done(place, record, plan, store, summary.errors)
    place.write(
        msgspec.structs.replace(record, finished=now(), errors=summary.errors, written=stamp(output), problem=None)
    )
    return summary


def clear(place: Place, record: Record, errors: int) -> None:
    """Removes what is on disk of a batch that is finished, unless there are errors, which a rerun retries.

    The record of one that the agent answered stays, so that its user learns of the end.
    """
    if not errors:
        place.remove(record_too=not record.detached)


def prune(before: float) -> int:
    """Removes batches that were finished before a time (seconds since the epoch); returns their number."""
    old = [place for place, record in places() if record.finished is not None and record.finished < before]
    for place in old:
        place.remove()
    for path in batches_dir().glob("*.done"):
        if path.stat().st_mtime < before:
            path.unlink(missing_ok=True)
    for path in batches_dir().glob("*.lock"):
        # A process that was killed has left it. Where there is a store, the batch goes on.
        if not path.with_suffix(".db").exists():
            with contextlib.suppress(Held), holding(path, remove=True):
                pass
    return len(old)

"""Recognizes a batch that is done already, when the same command comes again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from split_common.errors import ConfigError
from split_common.system.files import write_private
from split_device.batches.lines import Entry
from split_device.batches.place import FinishedBatch, OutputForm, Place, Record, stamp
from split_device.batches.plan import Plan
from split_device.jobs.store import Store
from split_device.jobs.vault import Vault, read_key


def note_done(place: Place, record: Record, plan: Plan, store: Store, errors: int) -> None:
    """Notes that all answers of a batch are written, or forgets it if some are errors. Raises KeysError."""
    written = stamp(Path(record.output))
    if errors or written is None:
        place.done.unlink(missing_ok=True)
        return
    fingerprint = store.digest(_fingerprint(plan.entries(), record.output_form, record.output_dir))
    done = FinishedBatch(record.lines, record.jobs, fingerprint.hex(), written)
    write_private(place.done, msgspec.json.encode(done))


def find_done(place: Place, output: Path) -> FinishedBatch | None:
    """The batch that wrote this file, without errors; None if there is none, or the file has changed since."""
    try:
        done = msgspec.json.decode(place.done.read_bytes(), type=FinishedBatch)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return done if done.written == stamp(output) else None


def check_same(
    done: FinishedBatch,
    entries: Iterable[Entry],
    output: Path,
    form: OutputForm,
    output_dir: Path | None,
    store_key: Path | None,
) -> None:
    """Checks that a file has the answers to these lines, in this form.

    Raises:
        ConfigError: it has others, or a picture is gone.
        KeysError: the file of the key cannot be read.
    """
    directory = str(output_dir.resolve()) if output_dir is not None else None
    vault = Vault(read_key(store_key) if store_key is not None else None)
    found = vault.digest(_fingerprint(_with_pictures(entries, output_dir), form, directory)).hex()
    if found != done.fingerprint:
        raise ConfigError(
            f"{output} exists already, with answers to other lines or by other settings: remove it, or give "
            "--overwrite"
        )


def _with_pictures(entries: Iterable[Entry], directory: Path | None) -> Iterator[Entry]:
    for entry in entries:
        for file in entry.files if directory is not None else ():
            if directory is not None and not (directory / file).exists():
                raise ConfigError(f"{directory / file} is gone: --overwrite makes all pictures again")
        yield entry


def _fingerprint(entries: Iterable[Entry], form: OutputForm, directory: str | None) -> bytes:
    """Identifies lines with their settings, and how their answers are written."""
    digest = hashlib.sha256(msgspec.msgpack.encode((form, directory)))
    for entry in entries:
        digest.update(msgspec.msgpack.encode(msgspec.structs.replace(entry, jobs=())))
    return digest.digest()

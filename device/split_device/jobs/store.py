"""A device's jobs in an SQLite file, which survives crashes of the processes that use it."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from split_common.errors import ConfigError, JobsError, UnknownJob
from split_common.system.files import state_dir
from split_device.jobs.database import placeholders, transaction
from split_device.jobs.job import (
    FINAL,
    PAST,
    AnyChoice,
    AnyTask,
    Job,
    JobFinishReason,
    JobKind,
    Selection,
    State,
    Update,
    check_group,
    kind_of,
)
from split_device.jobs.reading import JOBS, JobReader
from split_device.sessions.identity import check_request_id

#: Size of the seed that is drawn for a job without one, in bits. SQLite's integers are signed.
SEED_BITS = 63


def store_path() -> Path:
    """The path of this user's store."""
    return state_dir() / "jobs.db"


@dataclass(frozen=True)
class Changed:
    """Jobs that were changed, and why others were not, by their ids."""

    jobs: list[Job]
    refused: dict[str, JobsError | UnknownJob]

    def check(self) -> None:
        """Raises the first reason why a job was not changed."""
        for error in self.refused.values():
            raise error


class Store(JobReader):
    """Jobs in a file of mode 0600. Several processes may open the same file, each for itself.

    An instance belongs to one thread. In a forked child all methods but `close` raise ForkedProcess.

    Args:
        path: the SQLite file. Created if it is missing.
        key_file: the key that seals prompts, answers, images, errors, names of groups, hooks and the sampler's
            state. Created with the store.

    Raises:
        StoreLocked: the store is sealed under another key, or sealed although no key was given, or the reverse.
        ConfigError: the file cannot be opened, or is not a store.
    """

    # --- for users -----------------------------------------------------------------------------------------

    def submit(
        self,
        task: AnyTask,
        priority: int = 0,
        key: str | None = None,
        group: str | None = None,
        request_id: str | None = None,
    ) -> Job:
        """Adds a job, or returns the existing job with the same key.

        Args:
            group: name of the group that a new job belongs to, which is made with its first job.
            request_id: the id by which logs name a new job's request; None for the job's own id.

        Raises:
            JobsError: the job with this key asks for something else, or the database cannot be written.
            ConfigError: the prompt or a setting has a wrong type, the key is empty, the group has no valid name, or
                the request id is not one.
        """
        with transaction(self._db, self.path):
            return self._submit(task, priority, key, self._group(group), request_id)

    def submit_all(self, tasks: Iterable[tuple[AnyTask, int, str | None]], group: str | None = None) -> list[Job]:
        """Adds jobs in one transaction: all of them or none. Raises what `submit` raises."""
        with transaction(self._db, self.path):
            number = self._group(group)
            return [self._submit(*entry, number) for entry in tasks]

    def submit_ids(self, tasks: Iterable[tuple[AnyTask, int, str | None]], group: str | None = None) -> list[str]:
        """As `submit_all`, for more jobs than fit into memory: returns their ids only."""
        with transaction(self._db, self.path):
            number = self._group(group)
            return [self._submit(*entry, number).id for entry in tasks]

    def _group(self, name: str | None) -> int | None:
        """The number of a group, which is made if it does not exist. None if there is no name."""
        if name is None:
            return None
        # Who reads the file of a sealed store sees which jobs belong together, and not what the group is called.
        data = check_group(name).encode()
        digest = self._vault.digest(data)
        sealed = self._vault.seal(data, f"group/{digest.hex()}")
        self._db.execute("INSERT OR IGNORE INTO groups (digest, name) VALUES (?, ?)", (digest, sealed))
        (number,) = self._db.execute("SELECT number FROM groups WHERE digest = ?", (digest,)).fetchone()
        return int(number)

    def _submit(
        self,
        task: AnyTask,
        priority: int,
        key: str | None,
        group: int | None,
        request_id: str | None = None,
    ) -> Job:
        if key is not None and not key.strip():
            raise ConfigError("the key is empty: leave it out, or give one")
        # A key may be as private as the prompt: only its digest is stored.
        digest = None if key is None else hashlib.sha256(key.encode(errors="surrogatepass")).digest()
        row = self._db.execute(f"{JOBS} WHERE key = ?", (digest,)).fetchone()
        if row is not None:
            job = self._job(row)
            # The seed that was drawn for a job is not part of the request.
            if job.task != (task.with_seed(job.task.seed) if task.needs_seed else task):
                raise JobsError(f"{job.id} has this key already, and asks for something else: use another key")
            return job
        if task.needs_seed:
            # Drawn now, so that the output is the same however often the job is interrupted.
            task = task.with_seed(secrets.randbits(SEED_BITS))
        id_ = f"job-{secrets.token_hex(6)}"
        sealed = self._vault.seal(_packed(task), f"{id_}/task")
        request = None
        if request_id is not None:
            request = self._vault.seal(check_request_id(request_id).encode(), f"{id_}/request")
        self._db.execute(
            "INSERT INTO jobs (id, key, kind, model, priority, created, task, group_number, request_id) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (id_, digest, kind_of(task), _name(task.model), priority, time.time(), sealed, group, request),
        )
        return self.get(id_)

    def cancel(self, id_: str, abandoned: Callable[[], bool] = lambda: False) -> Job:
        """Cancels a queued job at once, and marks a running one for its runner.

        Args:
            abandoned: whether no runner is left that could end a running job, which is then cancelled at once.

        Raises:
            UnknownJob: there is no such job.
            JobsError: the job has ended.
        """
        with transaction(self._db, self.path):
            return self._cancel(id_, abandoned())

    def cancel_all(self, ids: Iterable[str], abandoned: Callable[[], bool] = lambda: False) -> Changed:
        """Cancels jobs as `cancel` does, in one transaction; returns which, and which could not be cancelled."""
        with transaction(self._db, self.path):
            alone = abandoned()
            return _changed(ids, lambda id_: self._cancel(id_, alone))

    def _cancel(self, id_: str, abandoned: bool) -> Job:
        job = self.get(id_)
        if job.state == "queued" or (job.state == "running" and abandoned):
            self._end(id_, "cancelled")
        elif job.state == "running":
            self._db.execute("UPDATE jobs SET cancelling = 1 WHERE id = ?", (id_,))
        else:
            raise JobsError(f"{id_} {PAST[job.state]} already")
        return self.get(id_)

    def retry(self, id_: str) -> Job:
        """Queues a failed or cancelled job again: a text continues where it stopped, an image starts over.

        Raises:
            UnknownJob: there is no such job.
            JobsError: the job neither failed nor was cancelled.
        """
        with transaction(self._db, self.path):
            return self._retry(id_)

    def retry_all(self, ids: Iterable[str]) -> Changed:
        """Queues jobs again as `retry` does, in one transaction; returns which, and which could not be queued."""
        with transaction(self._db, self.path):
            return _changed(ids, self._retry)

    def _retry(self, id_: str) -> Job:
        job = self.get(id_)
        if job.state not in ("failed", "cancelled"):
            raise JobsError(f"{id_} {PAST[job.state]}: only a failed or cancelled job can be retried")
        self._db.execute(
            "UPDATE jobs SET state = 'queued', cancelling = 0, finished = NULL, error = NULL WHERE id = ?", (id_,)
        )
        self.hooks.renew(id_)
        return self.get(id_)

    def retry_unsuccessful(self) -> int:
        """Queues all jobs again that failed or were cancelled; returns their number."""
        where, values = self._where(Selection(states=("failed", "cancelled")))
        query = f"UPDATE jobs SET state = 'queued', cancelling = 0, finished = NULL, error = NULL WHERE {where}"
        with transaction(self._db, self.path):
            return self._db.execute(query, values).rowcount

    def prune(self, before: float, states: Sequence[State] = FINAL) -> int:
        """Removes jobs that ended before a time (seconds since the epoch); returns their number."""
        query = f"DELETE FROM jobs WHERE state IN ({placeholders(states)}) AND finished < ?"
        with transaction(self._db, self.path):
            removed = self._db.execute(query, (*states, before)).rowcount
            self._remove_empty_groups()
        if removed:
            # The write-ahead log would keep the removed rows until it is overwritten.
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return removed

    def keep(self, ids: Iterable[str]) -> None:
        """Removes all jobs except these, of which there may be more than fit into memory."""
        with transaction(self._db, self.path):
            self._db.execute("CREATE TEMP TABLE kept (id TEXT PRIMARY KEY) WITHOUT ROWID")
            self._db.executemany("INSERT OR IGNORE INTO kept VALUES (?)", ((id_,) for id_ in ids))
            self._db.execute("DELETE FROM jobs WHERE id NOT IN kept")
            self._db.execute("DROP TABLE kept")
            self._remove_empty_groups()

    def _remove_empty_groups(self) -> None:
        self._db.execute(
            "DELETE FROM groups WHERE NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.group_number = groups.number)"
        )

    # --- for the runner ------------------------------------------------------------------------------------

    def recover(self) -> int:
        """Requeues the jobs that a killed runner left running; returns their number."""
        with transaction(self._db, self.path):
            for (id_,) in self._db.execute(
                "SELECT id FROM jobs WHERE state = 'running' AND cancelling = 1"
            ).fetchall():
                self._end(id_, "cancelled")
            return self._db.execute("UPDATE jobs SET state = 'queued' WHERE state = 'running'").rowcount

    def claim(self, limit: int, without: Collection[AnyChoice] = (), kind: JobKind = "text") -> list[Job]:
        """Marks up to `limit` queued jobs as running, by priority, then age; skips the models in `without`."""
        names = [_name(choice) for choice in without]
        query = (
            f"SELECT id FROM jobs WHERE state = 'queued' AND kind = ? AND model NOT IN ({placeholders(names)}) "
            "ORDER BY priority DESC, number LIMIT ?"
        )
        with transaction(self._db, self.path):
            ids = [id_ for (id_,) in self._db.execute(query, (kind, *names, limit))]
            for id_ in ids:
                now = time.time()
                self._db.execute(
                    "UPDATE jobs SET state = 'running', started = coalesce(started, ?), claimed = ?, "
                    "claimed_tokens = tokens WHERE id = ?",
                    (now, now, id_),
                )
            return [self.get(id_) for id_ in ids]

    def cancelling(self) -> list[str]:
        """Ids of the running jobs that a user has cancelled."""
        query = "SELECT id FROM jobs WHERE state = 'running' AND cancelling = 1"
        return [id_ for (id_,) in self._db.execute(query)]

    def write(self, updates: Iterable[Update]) -> None:
        """Stores the progress and the ends of jobs, in one transaction."""
        with transaction(self._db, self.path):
            for update in updates:
                self._write(update)

    def _write(self, update: Update) -> None:
        id_ = update.id
        if update.piece.tokens or update.piece.text:
            (number,) = self._db.execute("SELECT count(*) FROM pieces WHERE job = ?", (id_,)).fetchone()
            data = self._vault.seal(msgspec.msgpack.encode(update.piece), f"{id_}/{number}")
            self._db.execute("INSERT INTO pieces VALUES (?, ?, ?)", (id_, number, data))
            sampler = None if update.sampler is None else self._vault.seal(update.sampler, f"{id_}/sampler")
            self._db.execute(
                "UPDATE jobs SET tokens = tokens + ?, sampler = ? WHERE id = ?",
                (len(update.piece.tokens), sampler, id_),
            )
        if update.prompt_tokens is not None:
            self._db.execute("UPDATE jobs SET prompt_tokens = ? WHERE id = ?", (update.prompt_tokens, id_))
        if update.session is not None:
            self._db.execute("UPDATE jobs SET session = ? WHERE id = ?", (update.session, id_))
        if update.steps is not None:
            self._db.execute("UPDATE jobs SET steps = ? WHERE id = ?", (update.steps, id_))
        if update.image is not None:
            data = self._vault.seal(update.image, f"{id_}/image")
            self._db.execute("INSERT OR REPLACE INTO images VALUES (?, ?)", (id_, data))
        if update.state == "queued":
            self._db.execute("UPDATE jobs SET state = 'queued' WHERE id = ?", (id_,))
        elif update.state is not None:
            self._end(id_, update.state, update.finish_reason, update.error)

    def _end(
        self, id_: str, state: State, finish_reason: JobFinishReason | None = None, error: str | None = None
    ) -> None:
        sealed = None if error is None else self._vault.seal(error.encode(), f"{id_}/error")
        self._db.execute(
            "UPDATE jobs SET state = ?, finish_reason = ?, error = ?, finished = ? WHERE id = ?",
            (state, finish_reason, sealed, time.time(), id_),
        )


def _changed(ids: Iterable[str], change: Callable[[str], Job]) -> Changed:
    """Changes one job after the other."""
    found = Changed([], {})
    for id_ in ids:
        try:
            found.jobs.append(change(id_))
        except (JobsError, UnknownJob) as error:
            found.refused[id_] = error
    return found


def _packed(task: AnyTask) -> bytes:
    """A task as msgpack that decodes to the same task. Raises ConfigError if a value has a wrong type."""
    try:
        packed = msgspec.msgpack.encode(task)
        msgspec.msgpack.decode(packed, type=AnyTask)
    except (msgspec.ValidationError, UnicodeError, OverflowError, TypeError) as error:
        raise ConfigError(f"the prompt or a setting has a wrong type: {error}") from None
    return packed


def _name(choice: AnyChoice) -> str:
    return msgspec.json.encode(choice).decode()

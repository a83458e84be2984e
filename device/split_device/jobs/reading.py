"""Reads what a store holds: jobs, their progress and their output."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any, Self

import msgspec

from split_common.errors import JobsError, StoreLocked, UnknownJob
from split_common.system.forks import Birthplace
from split_device.jobs.database import open_database, placeholders, transaction
from split_device.jobs.hooks import Hooks
from split_device.jobs.job import STATES, AnyTask, Job, JobProgress, ScoredTextPiece, Selection

#: A job's row, with its group.
JOBS = (
    "SELECT jobs.*, groups.digest AS group_digest, groups.name AS group_name "
    "FROM jobs LEFT JOIN groups ON groups.number = jobs.group_number"
)


class JobReader:
    """Opens a store's file, and reads it. `Store` is the class to use, and says more.

    Raises:
        StoreLocked, ConfigError: as `Store`.
    """

    def __init__(self, path: Path, key_file: Path | None = None) -> None:
        self.path = path
        self._birthplace = Birthplace("the store of jobs")
        self._connection, self._vault = open_database(path, key_file)
        #: What is to happen when jobs have ended.
        self.hooks = Hooks(lambda: self._db, self._vault, path)

    @property
    def _db(self) -> sqlite3.Connection:
        self._birthplace.check()
        return self._connection

    def close(self) -> None:
        """Closes the file. Does nothing in a forked child: SQLite's files must not be closed there."""
        if not self._birthplace.is_elsewhere:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def seal(self, data: bytes, place: str) -> bytes:
        """Data that lies beside the store, sealed if the store is. `place` is not that of anything in the store."""
        return self._vault.seal(data, place)

    def unseal(self, data: bytes, place: str) -> bytes:
        """What `seal` made. Raises StoreLocked if it was sealed under another key, or for another place."""
        return self._vault.open(data, place)

    def digest(self, data: bytes) -> bytes:
        """A digest of data, from which nobody without the store's key can guess the data."""
        return self._vault.digest(data)

    def get(self, id_: str) -> Job:
        """The job with this id. Raises UnknownJob."""
        row = self._db.execute(f"{JOBS} WHERE id = ?", (id_,)).fetchone()
        if row is None:
            raise UnknownJob(f"no job has the id {id_}")
        return self._job(row)

    def jobs(self, selection: Selection = Selection(), limit: int = -1) -> list[Job]:
        """The selected jobs, the newest first, `limit` of them at most."""
        where, values = self._where(selection)
        query = f"{JOBS} WHERE {where} ORDER BY jobs.number DESC LIMIT ?"
        return [self._job(row) for row in self._db.execute(query, (*values, limit))]

    def ids(self, selection: Selection = Selection()) -> list[str]:
        """Ids of the selected jobs, the oldest first."""
        where, values = self._where(selection)
        return [id_ for (id_,) in self._db.execute(f"SELECT id FROM jobs WHERE {where} ORDER BY number", values)]

    def count(self, selection: Selection = Selection()) -> dict[str, int]:
        """The number of selected jobs in each state."""
        where, values = self._where(selection)
        found = self._db.execute(f"SELECT state, count(*) FROM jobs WHERE {where} GROUP BY state", values)
        return dict.fromkeys(STATES, 0) | dict(found)

    def generated(self, selection: Selection = Selection()) -> int:
        """The number of tokens that the selected jobs have generated."""
        where, values = self._where(selection)
        (tokens,) = self._db.execute(f"SELECT coalesce(sum(tokens), 0) FROM jobs WHERE {where}", values).fetchone()
        return int(tokens)

    def _where(self, selection: Selection) -> tuple[str, list[object]]:
        """A condition on the table `jobs` in SQL, and the values of its placeholders."""
        conditions, values = ["1"], list[object]()
        if selection.ids is not None:
            # One value: SQLite takes no more than some ten thousand.
            conditions.append("jobs.id IN (SELECT value FROM json_each(?))")
            values.append(json.dumps(selection.ids))
        if selection.states is not None:
            conditions.append(f"jobs.state IN ({placeholders(selection.states)})")
            values += selection.states
        if selection.group is not None:
            conditions.append("jobs.group_number = (SELECT number FROM groups WHERE digest = ?)")
            values.append(self._vault.digest(selection.group.encode(errors="surrogatepass")))
        if selection.since is not None:
            conditions.append("jobs.created >= ?")
            values.append(selection.since)
        return " AND ".join(conditions), values

    def pieces(self, id_: str, skip: int = 0) -> list[ScoredTextPiece]:
        """The pieces of text that a job has generated, without the first `skip`."""
        query = "SELECT number, data FROM pieces WHERE job = ? AND number >= ? ORDER BY number"
        rows = self._db.execute(query, (id_, skip)).fetchall()
        return [self._decode(self._vault.open(data, f"{id_}/{number}"), ScoredTextPiece) for number, data in rows]

    def progress(self, id_: str) -> JobProgress:
        """The output of a job so far, and the state from which it continues. Raises UnknownJob."""
        with transaction(self._db, self.path):
            row = self._db.execute("SELECT sampler FROM jobs WHERE id = ?", (id_,)).fetchone()
            pieces = self.pieces(id_)
        if row is None:
            raise UnknownJob(f"no job has the id {id_}")
        sampler = row["sampler"]
        return JobProgress(
            [token for piece in pieces for token in piece.tokens],
            "".join(piece.text for piece in pieces),
            None if sampler is None else self._vault.open(sampler, f"{id_}/sampler"),
            "".join(piece.reasoning for piece in pieces),
            tuple(delta for piece in pieces for delta in piece.calls),
            tuple(token for piece in pieces for token in piece.logprobs),
            "".join(piece.prompt for piece in pieces),
            tuple(token for piece in pieces for token in piece.prompt_logprobs),
        )

    def image(self, id_: str) -> bytes:
        """The image of a succeeded job, as a PNG file. Raises UnknownJob, or JobsError if it has no image."""
        row = self._db.execute("SELECT data FROM images WHERE job = ?", (id_,)).fetchone()
        if row is None:
            raise JobsError(f"{self.get(id_).id} has no image")
        return self._vault.open(row["data"], f"{id_}/image")

    # --- rows ----------------------------------------------------------------------------------------------

    def _job(self, row: sqlite3.Row) -> Job:
        id_, error, request = row["id"], row["error"], row["request_id"]
        return Job(
            id=id_,
            state=row["state"],
            priority=row["priority"],
            created=row["created"],
            started=row["started"],
            finished=row["finished"],
            cancelling=bool(row["cancelling"]),
            task=self._decode(self._vault.open(row["task"], f"{id_}/task"), AnyTask),
            prompt_tokens=row["prompt_tokens"],
            tokens=row["tokens"],
            steps=row["steps"],
            finish_reason=row["finish_reason"],
            error=None if error is None else self._vault.open(error, f"{id_}/error").decode(),
            group=self._group_name(row["group_digest"], row["group_name"]),
            claimed=row["claimed"],
            claimed_tokens=row["claimed_tokens"],
            request_id=id_ if request is None else self._vault.open(request, f"{id_}/request").decode(),
            session=row["session"],
        )

    def _group_name(self, digest: bytes | None, sealed: bytes) -> str | None:
        return None if digest is None else self._vault.open(sealed, f"group/{digest.hex()}").decode()

    def _decode(self, data: bytes, type_: Any) -> Any:
        try:
            return msgspec.msgpack.decode(data, type=type_)
        except msgspec.DecodeError:
            raise StoreLocked(f"{self.path} is damaged") from None

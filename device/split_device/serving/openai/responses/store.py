"""Responses that are kept, so that further ones can go on from them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from split_common.errors import SplitError
from split_device.jobs.database import Schema, open_database, transaction
from split_device.jobs.store import Store, store_path
from split_device.jobs.vault import Vault
from split_device.serving.fields import ApiError

#: How many responses are kept, and how many bytes of them; those that were not used for the longest time go first.
MAX_RESPONSES = 1000
MAX_BYTES = 256 * 1024**2

#: How long a response is kept after its last use, in seconds: 30 days, as in OpenAI's API.
MAX_AGE = 30 * 24 * 3600.0

#: Of how many responses one may be the last: a bound of what is read for a request.
MAX_CHAIN = 2 * MAX_RESPONSES

_SCHEMA = Schema(
    "a store of responses",
    b"lambda-split responses",
    1,
    """
CREATE TABLE responses (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    previous TEXT,
    used REAL NOT NULL,
    data BLOB NOT NULL
);
CREATE INDEX by_use ON responses (used, number);
""",
)

_T = TypeVar("_T")


class StoredResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A response, with what it answered."""

    id: str
    #: The id of the response that it goes on from.
    previous: str | None
    #: The items of the request's input.
    input: list[Any]
    response: dict[str, Any]


class ResponseStore:
    """Responses in an SQLite file beside the store of jobs, sealed if that is. Opened when it is first used.

    Its methods are for one event loop; SQLite runs in a thread of its own.

    Args:
        key_file: the key of the store of jobs; None if it is not sealed.
        path: the file; None for the one of this user.
        most, most_bytes: how many responses are kept, and how many bytes of them.
        max_age: how long they are kept after their last use, in seconds.
    """

    def __init__(
        self,
        key_file: Path | None = None,
        path: Path | None = None,
        most: int = MAX_RESPONSES,
        most_bytes: int = MAX_BYTES,
        max_age: float = MAX_AGE,
    ) -> None:
        self._key_file = key_file
        self._path = path or store_path().with_name("responses.db")
        self._most = most
        self._most_bytes = most_bytes
        self._max_age = max_age
        self._thread = ThreadPoolExecutor(1, "responses")
        self._opened: tuple[Any, Vault] | None = None

    async def check(self) -> None:
        """Opens the store. Raises ApiError if it cannot be opened, which says how to do without."""
        try:
            await self._run(self._open)
        except SplitError as error:
            raise ApiError(
                f'the response cannot be stored: {error}; to go without, send "store": false',
                param="store",
            ) from None

    async def has(self, id_: str) -> bool:
        """Whether a response with this id is kept."""
        return await self._run(self._has, id_)

    async def put(self, stored: StoredResponse) -> None:
        """Keeps a response, unless one with its id is kept. Raises JobsError if it cannot be written."""
        await self._run(self._put, stored)

    async def get(self, id_: str) -> StoredResponse:
        """The response with this id. Raises ApiError if there is none."""
        return (await self.chain(id_, 1))[-1]

    async def chain(self, id_: str, most: int = MAX_CHAIN) -> list[StoredResponse]:
        """The response with this id and those that it goes on from, the first one first.

        Args:
            most: of how many of them, counted from the last one.

        Raises:
            ApiError: one of them is not kept.
        """
        return await self._run(self._chain, id_, most)

    async def delete(self, id_: str) -> None:
        """Forgets a response. Raises ApiError if there is none with this id."""
        await self._run(self._delete, id_)

    def close(self) -> None:
        """Closes the file, once what is under way has been written."""
        self._thread.submit(self._close)
        self._thread.shutdown()

    async def _run(self, call: Callable[..., _T], *args: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

    # --- the store's own thread ----------------------------------------------------------------------------

    def _open(self) -> tuple[Any, Vault]:
        if self._opened is None:
            if store_path().exists():
                # Raises StoreLocked if jobs are sealed and responses would not be.
                Store(store_path(), self._key_file).close()
            self._opened = open_database(self._path, self._key_file, _SCHEMA)
        return self._opened

    def _put(self, stored: StoredResponse) -> None:
        db, vault = self._open()
        data = vault.seal(msgspec.json.encode(stored), stored.id)
        now = time.time()
        with transaction(db, self._path):
            db.execute(
                "INSERT OR IGNORE INTO responses (id, previous, used, data) VALUES (?, ?, ?, ?)",
                (stored.id, stored.previous, now, data),
            )
            self._prune(db, now)

    def _has(self, id_: str) -> bool:
        db, _ = self._open()
        return db.execute("SELECT 1 FROM responses WHERE id = ?", (id_,)).fetchone() is not None

    def _prune(self, db: Any, now: float) -> None:
        """Forgets what is too old, too much or too large."""
        db.execute("DELETE FROM responses WHERE used < ?", (now - self._max_age,))
        kept = "SELECT number, count(*) OVER w AS count, sum(length(data)) OVER w AS bytes FROM responses "
        window = "WINDOW w AS (ORDER BY used DESC, number DESC)"
        db.execute(
            f"DELETE FROM responses WHERE number IN (SELECT number FROM ({kept}{window}) "
            "WHERE count > ? OR bytes > ?)",
            (self._most, self._most_bytes),
        )

    def _chain(self, id_: str, most: int) -> list[StoredResponse]:
        db, vault = self._open()
        found: list[StoredResponse] = []
        wanted: str | None = id_
        with transaction(db, self._path):
            while wanted is not None and len(found) < most:
                row = db.execute("SELECT data FROM responses WHERE id = ?", (wanted,)).fetchone()
                if row is None:
                    raise _unknown(wanted)
                db.execute("UPDATE responses SET used = ? WHERE id = ?", (time.time(), wanted))
                stored = msgspec.json.decode(vault.open(row["data"], wanted), type=StoredResponse)
                found.append(stored)
                wanted = stored.previous
        return found[::-1]

    def _delete(self, id_: str) -> None:
        db, _ = self._open()
        with transaction(db, self._path):
            if not db.execute("DELETE FROM responses WHERE id = ?", (id_,)).rowcount:
                raise _unknown(id_)

    def _close(self) -> None:
        if self._opened is not None:
            self._opened[0].close()


def _unknown(id_: str) -> ApiError:
    message = f"no response with the id {id_!r} is kept here"
    return ApiError(message, 404, param="previous_response_id", code="previous_response_not_found")

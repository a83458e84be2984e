"""The SQLite file of a store: its schema, how it is created, opened and unsealed, and its transactions."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from split_common.errors import ConfigError, JobsError, SplitError, StoreLocked
from split_common.system.files import private_dir, user_path
from split_device.jobs.vault import Vault, make_key, read_key

#: Version of the schema (`PRAGMA user_version`). A store of an older version that is in `_MIGRATIONS` is brought up
#: to it when it is opened; any other one is refused.
SCHEMA_VERSION = 4

#: How long a write waits for another process to finish its own, in seconds.
BUSY_TIMEOUT = 30.0

#: The table of a known text, sealed like everything else, which shows on opening whether the key is the right one.
_MARK_TABLE = "CREATE TABLE mark (value BLOB NOT NULL);"

#: `claimed` and `claimed_tokens`: when a job began to run the last time, and the tokens that it had then.
#: `request_id`: if it is not the job's id. `session`: what broker and worker call the job's last session.
_TABLES = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    key BLOB UNIQUE,
    kind TEXT NOT NULL,
    model TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'queued',
    priority INTEGER NOT NULL,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    cancelling INTEGER NOT NULL DEFAULT 0,
    task BLOB NOT NULL,
    prompt_tokens INTEGER,
    tokens INTEGER NOT NULL DEFAULT 0,
    steps INTEGER NOT NULL DEFAULT 0,
    finish_reason TEXT,
    error BLOB,
    sampler BLOB,
    group_number INTEGER REFERENCES groups (number),
    claimed REAL,
    claimed_tokens INTEGER NOT NULL DEFAULT 0,
    request_id BLOB,
    session TEXT
);
CREATE INDEX queue ON jobs (state, kind, priority DESC, number);
CREATE TABLE pieces (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (job, number)
) WITHOUT ROWID;
CREATE TABLE images (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    data BLOB NOT NULL
);
"""

#: Tables that came with version 3. A hook is what is to happen when a job, or all jobs of a group, have ended.
_GROUPS = """
CREATE TABLE groups (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    digest BLOB NOT NULL UNIQUE,
    name BLOB NOT NULL
);
CREATE TABLE hooks (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT REFERENCES jobs (id) ON DELETE CASCADE,
    group_number INTEGER REFERENCES groups (number) ON DELETE CASCADE,
    action BLOB NOT NULL,
    fired REAL
);
CREATE INDEX members ON jobs (group_number, state);
CREATE INDEX hooks_of_jobs ON hooks (job);
CREATE INDEX hooks_of_groups ON hooks (group_number);
"""

#: What brings a store of a version to the next one.
_MIGRATIONS = {
    2: """
ALTER TABLE jobs ADD COLUMN group_number INTEGER REFERENCES groups (number);
ALTER TABLE jobs ADD COLUMN claimed REAL;
ALTER TABLE jobs ADD COLUMN claimed_tokens INTEGER NOT NULL DEFAULT 0;
"""
    + _GROUPS,
    3: """
ALTER TABLE jobs ADD COLUMN request_id BLOB;
ALTER TABLE jobs ADD COLUMN session TEXT;
""",
}


@dataclass(frozen=True)
class Schema:
    """The tables of a file.

    Args:
        name: what the file is, for errors.
        mark: a text that tells such files from others.
        migrations: what brings a file of a version to the next one.
    """

    name: str
    mark: bytes
    version: int
    tables: str
    migrations: Mapping[int, str] = field(default_factory=dict)


#: Jobs, their groups and hooks.
JOBS = Schema("a store of jobs", b"lambda-split jobs", SCHEMA_VERSION, _TABLES + _GROUPS, _MIGRATIONS)


def open_database(path: Path, key_file: Path | None, schema: Schema = JOBS) -> tuple[sqlite3.Connection, Vault]:
    """Opens a store's file, or creates it with mode 0600; returns the connection and the vault of its key.

    Args:
        key_file: the key's file; None if the store is not sealed. Created with the store.

    Raises:
        StoreLocked: the store is sealed under another key, or sealed although no key was given, or the reverse.
        ConfigError: the file cannot be opened, or is not a store.
        KeysError: the key's file cannot be read or written, or does not hold a key.
    """
    path = user_path(path)
    key_file = user_path(key_file) if key_file is not None else None
    private_dir(path.parent)
    try:
        # SQLite gives its other two files the mode of this one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        db = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"{path} cannot be opened: {error}") from None
    db.row_factory = sqlite3.Row
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA secure_delete = ON")
        with transaction(db, path):
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version not in (0, *schema.migrations, schema.version):
                raise ConfigError(f"{path} was made by another version of lambda-split")
            if not version:
                return db, _create(db, key_file, schema)
            vault = _unseal(db, path, key_file, schema)
            _migrate(db, version, schema)
            return db, vault
    except sqlite3.DatabaseError as error:
        db.close()
        raise ConfigError(f"{path} is not {schema.name}: {error}") from None
    except SplitError:
        db.close()
        raise


def _create(db: sqlite3.Connection, key_file: Path | None, schema: Schema) -> Vault:
    """Makes the tables, and the key unless its file exists."""
    key = None
    if key_file is not None:
        key = read_key(key_file) if key_file.exists() else make_key(key_file)
    vault = Vault(key)
    _execute_all(db, _MARK_TABLE + schema.tables)
    db.execute("INSERT INTO mark VALUES (?)", (vault.seal(schema.mark, "mark"),))
    db.execute(f"PRAGMA user_version = {schema.version}")
    return vault


def _migrate(db: sqlite3.Connection, version: int, schema: Schema) -> None:
    """Brings the tables from a version to the present one, in the caller's transaction."""
    for old in range(version, schema.version):
        _execute_all(db, schema.migrations[old])
        db.execute(f"PRAGMA user_version = {old + 1}")


def _execute_all(db: sqlite3.Connection, statements: str) -> None:
    """Executes statements within a transaction, which `executescript` would end."""
    for statement in statements.split(";"):
        db.execute(statement)


def _unseal(db: sqlite3.Connection, path: Path, key_file: Path | None, schema: Schema) -> Vault:
    """The vault of the key in `key_file`. Raises StoreLocked if it is not the store's."""
    (mark,) = db.execute("SELECT value FROM mark").fetchone()
    if (mark == schema.mark) != (key_file is None):
        if key_file is None:
            raise StoreLocked(f"{path} is encrypted: give its key file with --store-key")
        raise StoreLocked(f"{path} is not encrypted: leave out --store-key (and LAMBDA_SPLIT_STORE_KEY)")
    vault = Vault(read_key(key_file) if key_file is not None else None)
    try:
        vault.open(mark, "mark")
    except StoreLocked:
        raise StoreLocked(f"{path} is encrypted with another key than that of {key_file}") from None
    return vault


@contextlib.contextmanager
def transaction(db: sqlite3.Connection, path: Path) -> Iterator[None]:
    """An exclusive write transaction. Raises JobsError if the database cannot be written."""
    try:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")
    except sqlite3.OperationalError as error:
        raise JobsError(f"{path} cannot be written: {error}") from None


def placeholders(values: Sequence[object]) -> str:
    """One placeholder of SQL for each value."""
    return ", ".join("?" * len(values))

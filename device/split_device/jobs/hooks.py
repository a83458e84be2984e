"""What is to happen when jobs have ended: kept in the store until the agent has done it."""

from __future__ import annotations

import shlex
import shutil
import sqlite3
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from split_common.errors import ConfigError, StoreLocked
from split_device.jobs.database import placeholders, transaction
from split_device.jobs.job import FINAL
from split_device.jobs.vault import Vault

#: Hosts to which a webhook needs no TLS.
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """A program to run or a URL to call at the end of a job or a group."""

    #: The program and its arguments.
    command: tuple[str, ...] = ()
    #: The program's working directory.
    directory: str = ""
    webhook: str | None = None


def command_action(command: str) -> Action:
    """An action that runs a command in this directory, without a shell. Raises ConfigError."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"invalid command {command!r}: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise ConfigError(f"invalid command {command!r}: there is no program {words[0] if words else ''!r}")
    return Action(command=tuple(words), directory=str(Path.cwd()))


def webhook_action(url: str) -> Action:
    """An action that calls a URL. Raises ConfigError for one that is neither https nor on this machine."""
    try:
        parts = urllib.parse.urlsplit(url)
        valid = bool(parts.hostname) and parts.username is None and url.isascii() and url.isprintable()
        valid = valid and " " not in url and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or not (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)):
        raise ConfigError(
            f"invalid webhook {url!r}: expected https://HOST/PATH, or http:// with localhost, 127.0.0.1 or [::1]"
        )
    return Action(webhook=url)


@dataclass(frozen=True)
class DueHook:
    """An action whose job, or all jobs of whose group, have ended.

    Args:
        job: id of the job; None for a group.
        group: name of the group, or of the group that the job belongs to.
        state: the job's final state. Of a group "succeeded" if all its jobs have; else "failed" if any has;
            else "cancelled".
        counts: for a group, the number of its jobs in each final state.
    """

    number: int
    action: Action
    job: str | None
    group: str | None
    state: str
    counts: dict[str, int] | None


class Hooks:
    """The hooks of a store.

    Args:
        db: gives the store's connection.
    """

    def __init__(self, db: Callable[[], sqlite3.Connection], vault: Vault, path: Path) -> None:
        self._db, self._vault, self._path = db, vault, path

    def add(self, actions: Sequence[Action], jobs: Sequence[str] = (), group: str | None = None) -> None:
        """Adds actions to each of these jobs, or to a group. One that is there and was not done stays one.

        Args:
            group: name of a group that exists.
        """
        with transaction(self._db(), self._path):
            for action in actions:
                if group is None:
                    for job in jobs:
                        self._add(action, f"job/{job}", job, None)
                else:
                    digest = self._vault.digest(group.encode())
                    (number,) = (
                        self._db().execute("SELECT number FROM groups WHERE digest = ?", (digest,)).fetchone()
                    )
                    self._add(action, f"group/{digest.hex()}", None, number)

    def _add(self, action: Action, owner: str, job: str | None, group: int | None) -> None:
        query = "SELECT action FROM hooks WHERE fired IS NULL AND job IS ? AND group_number IS ?"
        present = [self._opened(sealed, owner) for (sealed,) in self._db().execute(query, (job, group))]
        if action not in present:
            sealed = self._vault.seal(msgspec.msgpack.encode(action), f"hook/{owner}")
            self._db().execute(
                "INSERT INTO hooks (job, group_number, action) VALUES (?, ?, ?)", (job, group, sealed)
            )

    def _opened(self, sealed: bytes, owner: str) -> Action:
        try:
            return msgspec.msgpack.decode(self._vault.open(sealed, f"hook/{owner}"), type=Action)
        except msgspec.DecodeError:
            raise StoreLocked(f"{self._path} is damaged") from None

    def of_job(self, id_: str) -> list[Action]:
        """The actions at the end of a job that are still to be done."""
        query = "SELECT action FROM hooks WHERE fired IS NULL AND job = ?"
        return [self._opened(sealed, f"job/{id_}") for (sealed,) in self._db().execute(query, (id_,))]

    def due(self) -> list[DueHook]:
        """What is to be done now."""
        final = placeholders(FINAL)
        query = (
            "SELECT hooks.number, hooks.action, hooks.job, hooks.group_number, jobs.state, groups.digest, "
            "groups.name FROM hooks LEFT JOIN jobs ON jobs.id = hooks.job "
            "LEFT JOIN groups ON groups.number = coalesce(hooks.group_number, jobs.group_number) "
            f"WHERE hooks.fired IS NULL AND (jobs.state IN ({final}) OR (hooks.group_number IS NOT NULL "
            f"AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.group_number = hooks.group_number "
            f"AND jobs.state NOT IN ({final})))) "
            "ORDER BY hooks.number"
        )
        return [self._due(row) for row in self._db().execute(query, (*FINAL, *FINAL)).fetchall()]

    def _due(self, row: sqlite3.Row) -> DueHook:
        digest, job = row["digest"], row["job"]
        group = None if digest is None else self._vault.open(row["name"], f"group/{digest.hex()}").decode()
        action = self._opened(row["action"], f"group/{digest.hex()}" if job is None else f"job/{job}")
        if job is not None:
            return DueHook(row["number"], action, job, group, row["state"], None)
        query = "SELECT state, count(*) FROM jobs WHERE group_number = ? GROUP BY state"
        counts = dict.fromkeys(map(str, FINAL), 0) | dict(
            self._db().execute(query, (row["group_number"],)).fetchall()
        )
        state = "failed" if counts["failed"] else "cancelled" if counts["cancelled"] else "succeeded"
        return DueHook(row["number"], action, None, group, state, counts)

    def done(self, number: int) -> None:
        """Notes that a hook's action was done, or given up."""
        with transaction(self._db(), self._path):
            self._db().execute("UPDATE hooks SET fired = ? WHERE number = ?", (time.time(), number))

    def renew(self, id_: str) -> None:
        """Has the actions of a job, and of its group, done again at the next end. In the caller's transaction."""
        self._db().execute(
            "UPDATE hooks SET fired = NULL WHERE job = ? OR "
            "group_number = (SELECT group_number FROM jobs WHERE id = ?)",
            (id_, id_),
        )

"""`lambda-split redis-acl`: access rules of a Redis or Valkey server for a fleet."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Annotated, Literal

import typer

from split_common.cli.options import JsonOption, KeysOption
from split_common.system.console import emit_json, stderr
from split_common.system.files import private_dir, read_private, write_private
from split_common.transport.redis import acl
from split_common.transport.redis.key_names import Keys
from split_common.trust.fleet import load_fleet


def redis_acl(
    keys: KeysOption = None,
    layout: Annotated[
        Literal["setuser", "aclfile"],
        typer.Option(
            "--format",
            help="What is printed: setuser is commands for a running server, aclfile the lines of its ACL file.",
        ),
    ] = "setuser",
    passwords: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Add a hash of the password in DIR/NAME.password to each user's rules. Missing files are made.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Print access rules for Redis or Valkey: one user for each member of the fleet.

    Without --passwords, the rules leave passwords unchanged, and a new user cannot log in until it has one.
    """
    fleet = load_fleet(keys)
    users = acl.users(Keys(fleet.operator_key), fleet.roster())
    revoked = [member.name for member in fleet.roster().members if member.revoked and member.role != "broker"]
    if passwords is not None:
        private_dir(passwords)
        users = {user: ["resetpass", _password_hash(passwords, user), *words] for user, words in users.items()}
    users = {user: ["on", *words] for user, words in users.items()}
    if json:
        emit_json({"users": users, "revoked": revoked})
        return
    for user, words in users.items():
        print(("user" if layout == "aclfile" else "ACL SETUSER"), user, *_quoted(words, layout))
    if layout == "setuser":
        for name in revoked:
            print("ACL DELUSER", name)
    if passwords is not None:
        stderr.print(
            f"the passwords are in {passwords}: set each member's in $LAMBDA_SPLIT_REDIS_PASSWORD on its machine",
            soft_wrap=True,
        )


def _password_hash(directory: Path, user: str) -> str:
    path = directory / f"{user}.password"
    if not path.exists():
        write_private(path, secrets.token_urlsafe(32).encode())
    return "#" + hashlib.sha256(read_private(path).strip()).hexdigest()


def _quoted(words: list[str], layout: str) -> list[str]:
    """Quotes selectors with spaces for a command; an aclfile has no quotes."""
    return words if layout == "aclfile" else [f'"{word}"' if " " in word else word for word in words]

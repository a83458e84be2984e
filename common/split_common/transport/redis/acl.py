"""`lambda-split redis-acl`: the least that each member's Redis user must be allowed to do.

A device reads its own replies alone, and can only add to workers' lanes and wishes. A worker reads its own lane and
the wishes. Rules tell lanes apart by the mark of their owner's name, with which all ids of its peers begin.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Annotated, Literal

import typer

from split_common.cli.options import JsonOption, KeysOption
from split_common.console import emit_json, stderr
from split_common.errors import KeysError
from split_common.files import private_dir, read_private, write_private
from split_common.fleet import load_fleet
from split_common.keys import Role
from split_common.transport import member_mark
from split_common.transport.redis.keys import Keys

#: The user that `lambda-split keys publish` needs; no member can have this name.
OPERATOR = "operator"

#: What a peer does with its own lane.
_OWN = "+xread +xadd +xlen +xtrim +pexpire +del +memory|usage +multi +exec"

#: What redis-py asks a cluster, and what an address that names a database needs.
_CONNECT = "+cluster|slots +cluster|shards +cluster|myid +command +select +ping"


def rules(keys: Keys, role: Role | Literal["operator"], member: str) -> list[str]:
    """What a member's user may do, as words of `ACL SETUSER`; selectors in parentheses are one word each.

    Args:
        role: of the member; a broker has no business here.
    """
    reset = ["resetkeys", "resetchannels", "clearselectors", "-@all", *_CONNECT.split()]
    read_fleet = f"(%R~{keys.fleet}* +get +getrange +hgetall)"
    if role == "operator":
        return [*reset, f"~{keys.roster}*", "+getrange", "+set", "+multi", "+exec"]
    own = [*reset, f"~{keys.lanes(role, member)}", *_OWN.split()]
    if role == "device":
        return [
            *own,
            f"(%W~{keys.lanes('worker')} +xadd +memory|usage)",
            f"(%W~{keys.all_opens} +xadd +xlen)",
            read_fleet,
        ]
    return [
        *own,
        "+time",
        f"(%W~{keys.lanes('device')} %W~{keys.lanes('worker')} +memory|usage)",
        f"(%W~{keys.lanes('device')} +xadd)",
        f"(~{keys.all_opens} +xreadgroup +xautoclaim +xack +xdel +xtrim +xgroup|create +pexpire +del)",
        f"(~{keys.fleet}* +set +pexpire +hset +hdel)",
        read_fleet,
    ]


def redis_acl(
    keys: KeysOption = None,
    layout: Annotated[
        Literal["setuser", "aclfile"],
        typer.Option("--format", help="Commands for a server that runs, or lines of its aclfile."),
    ] = "setuser",
    passwords: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Put hashes of the passwords in DIR/NAME.password into the rules; makes files that are missing.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Print the access rules of Redis or Valkey for each member of the fleet: one user for each.

    Without --passwords the rules leave passwords as they are, and a new user cannot log in before it has one.
    """
    fleet = load_fleet(keys)
    names = Keys(fleet.operator_key)
    users: dict[str, list[str]] = {}
    marks: dict[bytes, str] = {}
    for member in fleet.roster().members:
        if member.role == "broker" or member.revoked:
            continue
        if (other := marks.setdefault(member_mark(member.name), member.name)) != member.name:
            raise KeysError(f"{member.name} could read what is for {other}: add one of them under another name")
        users[member.name] = rules(names, member.role, member.name)
    users[OPERATOR] = rules(names, "operator", OPERATOR)
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
            f"each member's password is in {passwords}: it belongs in $LAMBDA_SPLIT_REDIS_PASSWORD there",
            soft_wrap=True,
        )


def _password_hash(directory: Path, user: str) -> str:
    path = directory / f"{user}.password"
    if not path.exists():
        write_private(path, secrets.token_urlsafe(32).encode())
    return "#" + hashlib.sha256(read_private(path).strip()).hexdigest()


def _quoted(words: list[str], layout: str) -> list[str]:
    """In a command a selector's spaces need quotes; in an aclfile they have none."""
    return words if layout == "aclfile" else [f'"{word}"' if " " in word else word for word in words]

"""Access rules: the least that each member's Redis user must be allowed to do.

A device or worker reads its own lanes only, and can only add to others'. Besides lanes, a worker writes two keys of
its own: the list of its processes, and its copy of the roster. Devices write which workers have answered. The
roster itself is the operator's alone. Rules recognize a key's owner by the member's mark, with which the ids of all
its peers begin.

Scripts and functions would not help: the server runs them with the rights of the user that calls them.
"""

from __future__ import annotations

from typing import Literal

from split_common.errors import KeysError
from split_common.transport.peer_id import member_mark
from split_common.transport.redis.key_names import Keys
from split_common.trust.keys import Role, Roster

#: The user for `lambda-split keys publish` and `keys sweep`; no member can have this name.
OPERATOR = "operator"

#: Redis' own user, as which every connection begins. Rules for it would be rules for strangers.
DEFAULT_USER = "default"

#: What a peer does with its own lane.
_OWN = "+xread +xadd +xlen +xtrim +pexpire +del +memory|usage +multi +exec"

#: What redis-py asks a cluster, and what an address with a number of a database needs.
_CONNECT = "+cluster|slots +cluster|shards +cluster|myid +asking +command +select +ping"


def rules(keys: Keys, role: Role | Literal["operator"], member: str) -> list[str]:
    """What a member's user may do, as words of `ACL SETUSER`; selectors in parentheses are one word each.

    Args:
        keys: names of the fleet's keys.
        role: the member's role, which is not "broker".
        member: the member's name.
    """
    reset = ["resetkeys", "resetchannels", "clearselectors", "-@all", *_CONNECT.split()]
    read_fleet = f"(%R~{keys.fleet}* +getrange +exists)"
    if role == "operator":
        sweep = f"(~{keys.prefix}:* +pttl +memory|usage +unlink)"
        return [*reset, f"~{keys.roster}", "+getrange", "+set", "+info", "+scan", sweep]
    own = [*reset, f"~{keys.lanes(role, member)}", *_OWN.split()]
    if role == "device":
        words = f"(%W~{keys.fleet}answered:* %W~{keys.fleet}trial:* +set)"
        return [*own, f"(%W~{keys.lanes('worker')} +xadd +memory|usage)", words, read_fleet]
    return [
        *own,
        f"(%W~{keys.lanes('device')} %W~{keys.lanes('worker')} +memory|usage)",
        f"(%W~{keys.lanes('device')} +xadd)",
        # A worker can set it if it is not there, and never change it.
        f"(~{keys.boot} +setnx)",
        f"(~{keys.workers(member)} ~{keys.roster_copy(member)} +set +pexpire)",
        read_fleet,
    ]


def users(keys: Keys, roster: Roster) -> dict[str, list[str]]:
    """The rules of each member that may connect, and of the operator, by name.

    Raises:
        KeysError: two members' names have the same mark, so one could read the other's messages; or a member has
            the name of a user that Redis itself has.
    """
    found: dict[str, list[str]] = {}
    marks: dict[bytes, str] = {}
    for member in roster.members:
        if member.role == "broker" or member.revoked:
            continue
        if member.name == DEFAULT_USER:
            raise KeysError(
                f"no member can be called {DEFAULT_USER!r}, which is Redis' user for everybody: add it under "
                "another name, and revoke this one"
            )
        if (other := marks.setdefault(member_mark(member.name), member.name)) != member.name:
            raise KeysError(f"{member.name} could read what is for {other}: add one of them under another name")
        found[member.name] = rules(keys, member.role, member.name)
    found[OPERATOR] = rules(keys, "operator", OPERATOR)
    return found

"""Access rules: the least that each member's Redis user must be allowed to do.

A device reads its own lane only, and can only add to workers' lanes and to opens. A worker reads its own lane and
the opens. Rules recognize a lane's owner by the member's mark, with which the ids of all its peers begin.
"""

from __future__ import annotations

from typing import Literal

from split_common.errors import KeysError
from split_common.transport.peer_id import member_mark
from split_common.transport.redis.key_names import Keys
from split_common.trust.keys import Role, Roster

#: The user for `lambda-split keys publish`; no member can have this name.
OPERATOR = "operator"

#: What a peer does with its own lane.
_OWN = "+xread +xadd +xlen +xtrim +pexpire +del +memory|usage +multi +exec"

#: What redis-py asks a cluster, and what an address with a number of a database needs.
_CONNECT = "+cluster|slots +cluster|shards +cluster|myid +command +select +ping"


def rules(keys: Keys, role: Role | Literal["operator"], member: str) -> list[str]:
    """What a member's user may do, as words of `ACL SETUSER`; selectors in parentheses are one word each.

    Args:
        keys: names of the fleet's keys.
        role: the member's role, which is not "broker".
        member: the member's name.
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


def users(keys: Keys, roster: Roster) -> dict[str, list[str]]:
    """The rules of each member that may connect, and of the operator, by name.

    Raises:
        KeysError: two members' names have the same mark, so one could read the other's messages.
    """
    found: dict[str, list[str]] = {}
    marks: dict[bytes, str] = {}
    for member in roster.members:
        if member.role == "broker" or member.revoked:
            continue
        if (other := marks.setdefault(member_mark(member.name), member.name)) != member.name:
            raise KeysError(f"{member.name} could read what is for {other}: add one of them under another name")
        found[member.name] = rules(keys, member.role, member.name)
    found[OPERATOR] = rules(keys, "operator", OPERATOR)
    return found

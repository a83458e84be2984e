"""Removes what has no place in the server any more, for the operator: above all what a revoked member left there.

The server cannot bound what a member stores under its own keys. It can be revoked, and its keys deleted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import redis
from redis.exceptions import ResponseError

from split_common.transport.peer_id import member_mark
from split_common.transport.redis.answers import Refused, failed
from split_common.transport.redis.key_names import Keys
from split_common.transport.redis.roster import publish
from split_common.transport.redis.server import RedisConnector
from split_common.transport.redis.trials import ANSWERED_FOR
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Roster

#: Milliseconds of the longest lease that a lane of an honest peer may have.
LONGEST_LEASE = 1_000_000

#: Keys that are looked at in one round trip.
BATCH = 500

#: Name of what belongs to no member, e.g. to an older version.
NOBODY = ""


@dataclass
class Swept:
    """What a sweep removed, and what members have there now."""

    #: Removed keys and their bytes, by member; `NOBODY` for those of none.
    keys: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    #: Bytes that stay, by member.
    left: Counter[str] = field(default_factory=Counter)


class Owners:
    """Tells from a key's name whose it is, and whether it may be there.

    Args:
        keys: names of the fleet's keys.
        roster: the newest one.
    """

    def __init__(self, keys: Keys, roster: Roster) -> None:
        prefix, fleet = re.escape(keys.prefix), re.escape(keys.fleet)
        self._lane = re.compile(rf"{prefix}:\{{([dw]):([0-9a-f]{{8}})[0-9a-f]{{8}}\}}")
        self._own = re.compile(rf"{fleet}(?:workers|roster):([0-9a-f]{{8}})")
        self._words = re.compile(rf"{fleet}(?:answered|trial):([0-9a-f]{{8}})")
        self._any = re.compile(rf"{prefix}:\{{(?:[dw]:|fleet\}}:(?:workers|roster):)([0-9a-f]{{8}})")
        self._of_all = {keys.boot, keys.roster}
        marks = [(member_mark(member.name).hex(), member) for member in roster.members if member.role != "broker"]
        self._names = {mark: member.name for mark, member in marks}
        self._roles = {mark: member.role[0] for mark, member in marks if not member.revoked}

    def owner(self, key: str) -> str:
        """The member whose key this is, revoked or not; `NOBODY` if it is nobody's."""
        found = self._any.match(key)
        return self._names.get(found[1], NOBODY) if found else NOBODY

    def allows(self, key: str, ttl: int) -> bool:
        """Whether a key may be there.

        Args:
            key: its name.
            ttl: milliseconds until it expires; negative if it does not.
        """
        if lane := self._lane.fullmatch(key):
            return self._roles.get(lane[2]) == lane[1] and 0 <= ttl <= LONGEST_LEASE
        if own := self._own.fullmatch(key):
            return self._roles.get(own[1]) == "w"
        if words := self._words.fullmatch(key):
            return self._roles.get(words[1]) == "w" and 0 <= ttl <= ANSWERED_FOR * 1000
        return key in self._of_all


def sweep(address: str, fleet: Fleet, dry_run: bool = False) -> Swept:
    """Publishes the roster, and removes the keys of members that are not in it, are revoked, or break the rules.

    Lanes must have a lease; what older versions stored, and what has no known name, goes as well. Keys of other
    fleets and programs are not looked at.

    Args:
        address: of the server. Its user is the operator.
        fleet: its newest roster says who is a member.
        dry_run: only look.

    Raises:
        ConfigError, BrokerUnreachable, CertificateError: as `publish`.
    """
    publish(address, fleet)
    keys = Keys(fleet.operator_key)
    owners, swept = Owners(keys, fleet.roster()), Swept()
    server = RedisConnector(address)
    try:
        for client in server.servers():
            with server.contained():
                for names in _batches(client, f"{keys.prefix}:*"):
                    _sweep(client, names, owners, dry_run, swept)
    except ResponseError as error:
        raise Refused(f"{server.shown}: {failed(error, server.shown)}") from None
    finally:
        server.close()
    return swept


def _batches(client: redis.Redis, pattern: str) -> Iterator[list[bytes]]:
    """The names of all keys that match, at most about `BATCH` at a time."""
    cursor = 0
    while True:
        cursor, names = client.scan(cursor, match=pattern, count=BATCH)
        if names:
            yield [name for name in names if isinstance(name, bytes)]
        if not cursor:
            return


def _sweep(client: redis.Redis, names: list[bytes], owners: Owners, dry_run: bool, swept: Swept) -> None:
    pipeline = client.pipeline(transaction=False)
    for name in names:
        pipeline.pttl(name)
        pipeline.memory_usage(name)
    answers = pipeline.execute()
    gone: list[bytes] = []
    for name, ttl, size in zip(names, answers[::2], answers[1::2], strict=True):
        if ttl == _EXPIRED or size is None:
            continue
        key = name.decode(errors="replace")
        owner = owners.owner(key)
        if owners.allows(key, ttl):
            swept.left[owner] += size
            continue
        swept.keys[owner] += 1
        swept.bytes[owner] += size
        gone.append(name)
    if dry_run or not gone:
        return
    pipeline = client.pipeline(transaction=False)
    for name in gone:
        pipeline.unlink(name)
    pipeline.execute()


#: PTTL's answer for a key that is not there any more.
_EXPIRED = -2

"""Names of the keys in Redis, and the format of stream entries.

    ls:FLEET:{w:PEER}                a worker's lane: messages from devices
    ls:FLEET:{d:PEER}                a device's lane: replies
    ls:FLEET:{fleet}:workers:MARK    announcements of the processes of one worker, which alone writes it
    ls:FLEET:{fleet}:answered:MARK   a device says that a worker has answered it
    ls:FLEET:{fleet}:trial:MARK      a device has a worker that has answered nobody yet
    ls:FLEET:{fleet}:boot            random; changes when the server has lost its data
    ls:FLEET:{fleet}:roster          the signed roster, as the operator published it
    ls:FLEET:{fleet}:roster:MARK     a copy that one worker keeps, in case the server loses its data

A lane is the stream of messages for one peer. The peer is alive as long as its lane exists: a lane expires unless
its owner's heartbeats renew it. MARK stands for a member (`split_common.transport.peer_id.member_mark`), in hex;
ids of peers begin with it. A cluster chooses the server of a key by the part in braces.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from split_common.errors import Malformed
from split_common.transport.peer_id import member_mark
from split_common.trust.keys import Role

#: The largest number in the id of a stream's entry: nothing can be added after it.
LAST_ID = 2**64 - 1


class Keys:
    """The names of a fleet's keys.

    Args:
        operator_key: the operator's Ed25519 public key (32 bytes), which tells fleets on one server apart.
    """

    def __init__(self, operator_key: bytes) -> None:
        self.prefix = "ls:" + hashlib.blake2b(operator_key, digest_size=4).hexdigest()
        self.fleet = f"{self.prefix}:{{fleet}}:"
        self.boot = f"{self.fleet}boot"
        self.roster = f"{self.fleet}roster"
        #: Where workers of older versions announce themselves.
        self.old_workers = f"{self.fleet}workers"

    def workers(self, member: str) -> str:
        """The announcements of a worker's processes."""
        return f"{self.fleet}workers:{member_mark(member).hex()}"

    def roster_copy(self, member: str) -> str:
        """The roster that a worker keeps."""
        return f"{self.fleet}roster:{member_mark(member).hex()}"

    def answered(self, mark: bytes) -> str:
        """Devices' word that the worker with this mark has answered requests."""
        return f"{self.fleet}answered:{mark.hex()}"

    def trial(self, mark: bytes) -> str:
        """That some device has the worker with this mark, which has answered nobody yet."""
        return f"{self.fleet}trial:{mark.hex()}"

    def lane(self, role: Role, peer: bytes) -> str:
        """The stream of messages for a peer."""
        return f"{self.prefix}:{{{role[0]}:{peer.hex()}}}"

    def lanes(self, role: Role, member: str = "") -> str:
        """A pattern for the lanes of all peers of a role, or of one member."""
        return f"{self.prefix}:{{{role[0]}:{member_mark(member).hex() if member else ''}*"


def entry(head: bytes, body: bytes) -> tuple[bytes | str, ...]:
    """The fields of a message in a stream."""
    return "h", head, "b", body


def read_entry(fields: Any) -> tuple[bytes, bytes]:
    """The two frames of a message in a stream.

    Raises:
        Malformed: the entry is not a message.
    """
    if not isinstance(fields, list) or len(fields) != 4 or fields[0] != b"h" or fields[2] != b"b":
        raise Malformed("an entry that is not a message")
    return fields[1], fields[3]


def next_id(id_: bytes) -> str | None:
    """The least id above an entry's; None if it has the largest id.

    Raises:
        Malformed: this is not an entry's id.
    """
    if not isinstance(id_, bytes) or not re.fullmatch(rb"\d{1,20}-\d{1,20}", id_):
        raise Malformed("an entry without an id")
    milliseconds, _, number = id_.decode().partition("-")
    if int(number) < LAST_ID:
        return f"{milliseconds}-{int(number) + 1}"
    return f"{int(milliseconds) + 1}-0" if int(milliseconds) < LAST_ID else None

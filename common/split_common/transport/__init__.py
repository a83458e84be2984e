"""The queue between devices and workers: the interface (`base`), and the transport for an address (`links`)."""

from split_common.transport.address import DEFAULT_BROKER, parse_address
from split_common.transport.base import (
    GRACE,
    HEARTBEAT,
    MISSED,
    OPEN_PATIENCE,
    Handler,
    Transport,
)
from split_common.transport.links import check_address, connect
from split_common.transport.peer_id import mark_of, member_mark, new_peer_id, peer_name
from split_common.transport.supervised import count_dropped

__all__ = [
    "DEFAULT_BROKER",
    "GRACE",
    "HEARTBEAT",
    "MISSED",
    "OPEN_PATIENCE",
    "Handler",
    "Transport",
    "check_address",
    "connect",
    "count_dropped",
    "mark_of",
    "member_mark",
    "new_peer_id",
    "parse_address",
    "peer_name",
]

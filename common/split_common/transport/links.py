"""The transport for an address."""

from __future__ import annotations

from typing import TYPE_CHECKING

from split_common.errors import ConfigError
from split_common.transport.address import is_local, is_redis, masked, parse_address

if TYPE_CHECKING:
    from split_common.transport.base import Transport
    from split_common.trust.fleet import Fleet
    from split_common.trust.keys import Identity


def connect(address: str, fleet: Fleet, identity: Identity) -> Transport:
    """The transport for an address, not started yet.

    Args:
        address: of a broker (`tcp://`, `zmq://`, `ipc://`) or of Redis (`address.REDIS_SCHEMES`).
        fleet: its roster and keys apply.
        identity: of the member that connects.

    Raises:
        ConfigError: the address is malformed, or open to other machines though no keys are configured.
    """
    address = parse_address(address)
    if address.endswith(":*"):
        raise ConfigError(f"broker address {address!r} has * for a port: give the port that the broker printed")
    check_address(address, fleet)
    if is_redis(address):
        from split_common.transport.redis.link import RedisLink

        return RedisLink(address, fleet, identity)
    from split_common.transport.zmq_link import ZmqLink

    return ZmqLink(address, fleet, identity)


def check_address(address: str, fleet: Fleet) -> None:
    """Refuses the loopback fleet, whose keys are made on the fly, at an address that other machines can reach.

    Args:
        address: as `parse_address` returns it, such as `tcp://127.0.0.1:5555` or `ipc:///run/queue`.

    Raises:
        ConfigError: no keys are configured, and other machines can reach the address.
    """
    if fleet.is_loopback and not is_local(address):
        raise ConfigError(
            f"{masked(address)} is open to other machines, and no keys are configured; run `lambda-split keys init`"
        )

"""The fleet's roster in Redis. Who reads it checks the operator's signature: it matters not who put it there."""

from __future__ import annotations

from split_common.errors import BrokerUnreachable, Malformed
from split_common.fleet import Fleet
from split_common.keys import MAX_SIGNED
from split_common.transport.redis.keys import Keys
from split_common.transport.redis.server import Command, Line, Server, failed

#: Digits that a roster's version may have.
_DIGITS = 18


def version_command(keys: Keys) -> Command:
    return keys.roster_version, ("GETRANGE", keys.roster_version, 0, _DIGITS - 1)


def version_of(answer: object) -> int:
    """The version that the server's roster claims to have; 0 for none. Raises Malformed."""
    if not isinstance(answer, bytes) or not (answer.isdigit() or not answer):
        raise Malformed("the roster's version is no number")
    return int(answer or b"0")


def fetch(line: Line, keys: Keys, fleet: Fleet) -> None:
    """Takes over the server's roster. Raises CertificateError, BrokerUnreachable."""
    (data,) = line.run([(keys.roster, ("GETRANGE", keys.roster, 0, MAX_SIGNED["roster"]))])
    fleet.accept_roster(data)


def put(line: Line, keys: Keys, fleet: Fleet) -> None:
    """Stores the fleet's roster. Raises BrokerUnreachable."""
    version, data = fleet.roster().version, fleet.roster_bytes()
    commands = (
        ("MULTI",),
        ("SET", keys.roster, data),
        ("SET", keys.roster_version, version),
        ("EXEC",),
    )
    for answer in line.run([(keys.roster, words) for words in commands]):
        if problem := failed(answer):
            raise BrokerUnreachable(f"the roster was not stored: {problem}")


def publish(address: str, fleet: Fleet) -> int:
    """Stores the roster unless a newer one is there, which is taken over; the version that is there afterwards.

    Raises BrokerUnreachable, ConfigError, CertificateError.
    """
    server = Server(address)
    line = Line(server)
    keys = Keys(fleet.operator_key)
    try:
        (answer,) = line.run([version_command(keys)])
        if problem := failed(answer):
            raise BrokerUnreachable(f"{server.shown}: {problem}")
        there = version_of(answer)
        if there > fleet.roster().version:
            fetch(line, keys, fleet)
        else:
            put(line, keys, fleet)
    finally:
        line.close()
        server.close()
    return fleet.roster().version

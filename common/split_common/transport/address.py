"""Addresses of queues: their kinds, whether they are on this machine, and how to print them without secrets."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, unquote

from split_common.errors import ConfigError
from split_common.system.files import user_path

#: Where the broker listens, and where peers look for it, when no address is given.
DEFAULT_BROKER = "tcp://127.0.0.1:7411"

#: Schemes of Redis: the kind (one server, the master that Sentinels name, or a cluster), and whether over TLS.
REDIS_SCHEMES: Final[dict[str, tuple[str, bool]]] = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}

_FORMS = (
    "tcp://HOST:PORT, zmq://HOST:PORT, ipc://PATH, redis://HOST:PORT, rediss://HOST:PORT, "
    "redis+sentinel://HOST:PORT,HOST:PORT/SERVICE, redis+cluster://HOST:PORT,HOST:PORT"
)


#: What to do if a user name or a password holds a sign with a meaning of its own, for messages.
ESCAPE = "in a user name or password, write @ as %40, ? as %3F and % as %25"

#: How to write a sign that is not ASCII, for messages.
ENCODING = "write the bytes of its UTF-8, é as %C3%A9, not %E9"


@dataclass(frozen=True, repr=False)
class RedisAddress:
    """The parts of a Redis address. User name and password are decoded, and empty if there are none."""

    kind: str
    tls: bool
    user: str
    password: str
    hosts: tuple[tuple[str, int], ...]
    #: Sentinel's name for the master; empty without Sentinels.
    service: str
    database: int
    query: str


def is_redis(address: str) -> bool:
    return address.partition("://")[0] in REDIS_SCHEMES


def parse_address(address: str) -> str:
    """Normalizes a broker's address: `zmq://host:port` is short for `tcp://host:port`, `~` for the home directory.

    Raises:
        ConfigError: the scheme is unknown, or something is missing.
    """
    if is_redis(address):
        parse_redis(address)
        return address
    scheme, separator, rest = address.partition("://")
    # Names with @ or * are not files, so no directory would guard the socket.
    if separator and scheme == "ipc" and rest and rest[0] not in "@*":
        return f"ipc://{user_path(rest)}"
    if separator and scheme in ("zmq", "tcp"):
        if "@" in rest:
            raise ConfigError(
                f"broker address {masked(address)!r} has a user or password, which only Redis takes: keys say who "
                "may use a broker"
            )
        host, colon, port = rest.rpartition(":")
        if colon and host and (port == "*" or _is_port(port)):
            return f"tcp://{rest}"
        raise ConfigError(f"broker address {masked(address)!r} {_port_fault(port)}: tcp://HOST:PORT")
    raise ConfigError(f"broker address {masked(address)!r} has none of these forms: {_FORMS}")


def parse_redis(address: str) -> RedisAddress:
    """Parses a Redis address: `SCHEME://[USER[:PASSWORD]@]HOST:PORT[,HOST:PORT…][/SERVICE][/DATABASE][?…]`.

    User name and password may be percent-encoded, and must be where they hold `@`, `?` or `%`.

    Raises:
        ConfigError: it is not of this form.
    """
    scheme, _, rest = address.partition("://")
    kind, tls = REDIS_SCHEMES[scheme]
    rest, _, query = rest.partition("?")
    credentials, _, place = rest.rpartition("@")
    if "@" in query:
        raise _malformed(address, f"has an @ behind a ?; {ESCAPE}")
    netloc, _, path = place.partition("/")
    hosts = tuple(_host(part, address) for part in netloc.split(","))
    service, _, database = path.rpartition("/")
    if kind == "sentinel" and not service:
        service, database = path, ""
    if kind == "sentinel" and not service:
        raise _malformed(address, "lacks the name of the service after the last host")
    if kind != "sentinel" and (service or (kind == "server" and len(hosts) > 1)):
        raise _malformed(address, f"has none of these forms: {_FORMS}")
    if kind == "cluster" and database not in ("", "0"):
        raise ConfigError("a Redis cluster has only database 0")
    if database and not (database.isascii() and database.isdigit() and len(database) < 10):
        raise _malformed(address, "must end in a database number")
    user, _, password = credentials.partition(":")
    try:
        user, password = (unquote(part, errors="strict") for part in (user, password))
        parse_qs(query, errors="strict")
        f"{user}{password}{query}".encode()
    except UnicodeError:
        raise _malformed(address, f"has a user, password or option that is not UTF-8; {ENCODING}") from None
    return RedisAddress(kind, tls, user, password, hosts, service, int(database or 0), query)


def _malformed(address: str, why: str) -> ConfigError:
    return ConfigError(f"broker address {masked(address)!r} {why}")


def _host(text: str, address: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not _is_port(port):
        raise _malformed(address, f"{_port_fault(port)}: redis://HOST:PORT ({ESCAPE})")
    return _bare(host), int(port)


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of a parsed `tcp://HOST:PORT`."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return _bare(host), int(port)


def _bare(host: str) -> str:
    """An IPv6 address without its brackets."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) < 65536


def _port_fault(text: str) -> str:
    """What is wrong with what stands in the place of a port."""
    return "has no port from 1 to 65535" if text.isascii() and text.isdigit() else "lacks a port"


def masked(address: str) -> str:
    """The address for messages and logs: without user, password and options."""
    before, separator, after = address.partition("://")
    scheme, rest = (before, after) if separator else ("", address)
    if scheme == "ipc":
        return address
    place = rest.rpartition("@")[2]
    # An unescaped @ behind the ? may be part of a secret.
    if "?" in rest.removesuffix(place):
        return f"{scheme}{separator}…"
    return f"{scheme}{separator}{place.partition('?')[0]}"


def is_local(address: str) -> bool:
    """Whether only this machine can reach an address."""
    if is_redis(address):
        # Servers that Sentinels and clusters name are assumed to be as local as those in the address.
        return all(_is_loopback(host) for host, _ in parse_redis(address).hosts)
    scheme, _, rest = address.partition("://")
    if scheme == "ipc":
        return True
    return scheme == "tcp" and _is_loopback(_bare(rest.rpartition(":")[0]))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""The names under which clients may reach the server."""

from __future__ import annotations

import re

from split_common.errors import ConfigError

#: Host names that requests may have. Others are refused: a web page may have rebound its own name to this machine.
HOSTS = ("127.0.0.1", "localhost", "[::1]")


def check_host(name: str) -> str:
    """A host name, as `host_name` returns it. Raises ConfigError if it is not the name or address of a host."""
    if not re.fullmatch(r"[\w.-]+|\[[0-9a-f:.]+\]", name, re.ASCII | re.IGNORECASE):
        raise ConfigError(f"invalid host name {name!r}: expected e.g. host.docker.internal, without a port")
    return host_name(name)


def host_name(host: str) -> str:
    """The name in a `Host` header: without the port, in lower case, without the root's dot."""
    return re.sub(r":\d*$", "", host).lower().removesuffix(".")

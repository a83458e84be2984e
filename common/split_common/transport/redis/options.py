"""From an address to redis-py's options. Whatever is wrong with them is said here, before anything is sent."""

from __future__ import annotations

import inspect
import os
from typing import Any
from urllib.parse import parse_qs

import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.connection import parse_url
from redis.exceptions import RedisError
from redis.retry import Retry

from split_common.compat.redis import check_tls
from split_common.errors import ConfigError
from split_common.system.files import user_path
from split_common.transport.address import RedisAddress, is_local, masked, parse_redis
from split_common.transport.redis.answers import PASSWORD_VARIABLE

#: Environment variable with the Sentinels' password, if the address has none.
SENTINEL_PASSWORD_VARIABLE = "LAMBDA_SPLIT_REDIS_SENTINEL_PASSWORD"  # noqa: S105

#: Option of an address: passwords may travel without TLS to other machines.
INSECURE = "insecure"

#: Options of redis-py that are not an address's to set: the rest of the address says them, or the transport needs
#: its own values.
_OWN = (
    *(
        "host",
        "port",
        "path",
        "db",
        "ssl",
        "timeout",
        "socket_timeout",
        "socket_connect_timeout",
        "socket_read_size",
    ),
    *("protocol", "legacy_responses", "encoding", "encoding_errors", "decode_responses", "retry", "retry_on_error"),
    *("retry_on_timeout", "driver_info", "lib_name", "lib_version", "connection_class", "connection_pool"),
    *("redis_connect_func", "credential_provider", "single_connection_client", "unix_socket_path", "cache"),
    *("cache_config", "event_dispatcher", "socket_keepalive_options", "maint_notifications_config"),
    *("oss_cluster_maint_notifications_handler", "ssl_ocsp_context", "startup_nodes", "url", "address_remap"),
    *("load_balancing_strategy", "policy_resolver"),
)

#: The least values of options that are numbers.
_LEAST = {"max_connections": 1, "health_check_interval": 0}

#: Options whose values are files.
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")

#: Seconds that the server may take to answer, or to accept a command.
ANSWER_TIMEOUT = 5.0

#: Seconds that connecting may take.
CONNECT_TIMEOUT = 3.0


class Options:
    """redis-py's options for the server of an address, and for Sentinels, which may have users of their own.

    Raises:
        ConfigError: the address is malformed; an option is unknown, or its value or file cannot be used; or a
            password would travel in the clear.
    """

    def __init__(self, address: str) -> None:
        self.address = parse_redis(address)
        self.shown = masked(address)
        server = _parsed(self.address, self.shown)
        insecure = server.pop(INSECURE, "0") not in ("0", "no", "false")
        own = {name: server.pop(f"sentinel_{name}", "") for name in ("username", "password")}
        own["password"] = own["password"] or os.environ.get(SENTINEL_PASSWORD_VARIABLE, "")
        if not self.address.tls:
            self._check_plain(address, server, insecure, secrets=[server.get("password"), own["password"]])
        #: Options of connections to the server.
        self.server = server
        #: Options of connections to Sentinels.
        self.sentinel = {
            **{name: value for name, value in server.items() if name not in ("username", "password", "db")},
            **{name: value for name, value in own.items() if value},
        }
        self._try_out()

    def _check_plain(self, address: str, server: dict[str, Any], insecure: bool, secrets: list[str | None]) -> None:
        tls = "redis" + "s" + address.partition("://")[0].removeprefix("redis")
        if unused := [name for name in server if name.startswith("ssl_")]:
            raise ConfigError(f"broker address {self.shown!r}: {unused[0]} needs TLS, that is {tls}://")
        if any(secrets) and not insecure and not is_local(address):
            raise ConfigError(
                f"the password for {self.shown} would travel unencrypted: use {tls}://, or add ?{INSECURE}=1 if "
                "you trust every network in between"
            )

    def _try_out(self) -> None:
        """Makes a connection that is never connected."""
        try:
            of_clusters = inspect.signature(RedisCluster).parameters if self.address.kind == "cluster" else {}
            shared = {name: value for name, value in self.server.items() if name not in of_clusters}
            client = redis.Redis(host="localhost", port=1, **shared)
            if self.address.tls:
                check_tls(client)
        except (TypeError, ValueError, OSError, RedisError) as error:
            files = [self.server[name] for name in _FILES if name in self.server]
            about = f" ({', '.join(files)})" if isinstance(error, OSError) and files else ""
            raise ConfigError(f"broker address {self.shown!r} has a wrong option{about}: {error}") from None


def _parsed(address: RedisAddress, shown: str) -> dict[str, Any]:
    try:
        options: dict[str, Any] = parse_url(f"redis://host:1?{address.query}")
    except ValueError as error:
        raise ConfigError(f"broker address {shown!r} has a wrong option: {error}") from None
    for name in ("host", "port"):
        options.pop(name, None)
    if unknown := next((name for name in parse_qs(address.query, keep_blank_values=True) if name in _OWN), None):
        raise ConfigError(f"broker address {shown!r} has an option that cannot be set: {unknown}")
    for name, least in _LEAST.items():
        if options.get(name, least) < least:
            raise ConfigError(f"broker address {shown!r} has a wrong option: {name} is at least {least}")
    for name in _FILES:
        if isinstance(options.get(name), str):
            options[name] = str(user_path(options[name]))
    if address.user:
        options["username"] = address.user
    if password := address.password or options.get("password") or os.environ.get(PASSWORD_VARIABLE):
        options["password"] = password
    options.update(
        protocol=2,
        socket_timeout=ANSWER_TIMEOUT,
        socket_connect_timeout=CONNECT_TIMEOUT,
        socket_read_size=256 * 1024,
        retry=Retry(NoBackoff(), 0),
        driver_info=None,
    )
    if address.kind != "cluster":
        options["db"] = address.database
    if address.tls:
        options["ssl"] = True
    return options

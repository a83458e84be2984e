"""The Redis or Valkey behind an address: one server, the master that Sentinels name, or a cluster.

A `RedisConnections` is one thread's connections to it. It sends commands unchanged and returns raw answers. It
retries only after a cluster's redirection: after a lost connection, leases must be checked first.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import parse_url
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    ClusterError,
    ConnectionError,
    InvalidResponse,
    MovedError,
    NoPermissionError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)
from redis.retry import Retry
from redis.sentinel import Sentinel

from split_common.compat.redis import new_connection, reload_slots
from split_common.errors import BrokerUnreachable, ConfigError
from split_common.transport.address import RedisAddress, masked, parse_redis

#: Environment variable with the password, if the address has none.
PASSWORD_VARIABLE = "LAMBDA_SPLIT_REDIS_PASSWORD"  # noqa: S105

#: Seconds that the server may take to answer, or to accept a command.
ANSWER_TIMEOUT = 5.0

#: Seconds that connecting may take.
CONNECT_TIMEOUT = 3.0

#: Seconds to wait for the server to come back, first and at most; doubles each time.
RECONNECT = 0.05
RECONNECT_MAX = 0.5

#: Size in bytes above which an argument is not copied into one buffer with the others.
LARGE = 256 * 1024

#: Most redirections of a cluster that a command follows.
REDIRECTIONS = 5

_ELSEWHERE = (MovedError, AskError, TryAgainError, ClusterDownError)

#: A command: the key that says which server it goes to, and its words.
Command = tuple[str, Sequence[bytes | str | int]]


class Unreachable(BrokerUnreachable):
    """The server does not answer at the moment."""


class Refused(BrokerUnreachable):
    """The server refuses this user or this command. Trying again does not help."""


class RedisConnector:
    """Makes connections to the server or servers of an address. Any thread may call its methods.

    Raises:
        ConfigError: the address is malformed, or has an option that redis-py does not know.
    """

    def __init__(self, address: str) -> None:
        self._address = parse_redis(address)
        self.shown = masked(address)
        #: Error message for when the server does not answer at all.
        self.silence = f"no answer from {self.shown}" + (": is it a TLS port?" if self._address.tls else "")
        self._lock = threading.Lock()
        self._single: redis.Redis | None = None
        self._cluster: RedisCluster | None = None
        self._options = _options(self._address)
        try:
            if self._address.kind == "server":
                host, port = self._address.hosts[0]
                self._single = redis.Redis(host=host, port=port, **self._options)
            elif self._address.kind == "sentinel":
                self._single = _sentinel(self._address, self._options)
        except (TypeError, ValueError, RedisError) as error:
            raise ConfigError(f"broker address {self.shown!r}: {error}") from None

    @property
    def single(self) -> redis.Redis | None:
        """The client of the one server that holds all keys. None for a cluster."""
        return self._single

    def holder(self, key: str) -> redis.Redis:
        """The client of the server that holds a key.

        Raises:
            Unreachable: no server of the cluster answers.
            Refused: the cluster does not accept this user.
            ConfigError: redis-py does not accept an option of the address.
        """
        if self._single is not None:
            return self._single
        with self._lock, self.contained():
            if self._cluster is None:
                nodes = [ClusterNode(host, port) for host, port in self._address.hosts]
                try:
                    self._cluster = RedisCluster(startup_nodes=nodes, **self._options)
                except (TypeError, ValueError) as error:
                    raise ConfigError(f"broker address {self.shown!r}: {error}") from None
            node = self._cluster.get_node_from_key(key)
            assert node is not None
            client: redis.Redis = self._cluster.get_redis_connection(node)
            return client

    def look_again(self) -> None:
        """Asks a cluster again which server holds which keys."""
        with self._lock, self.contained():
            if self._cluster is not None:
                reload_slots(self._cluster)

    def close(self) -> None:
        for client in (self._single, self._cluster):
            if client is not None:
                client.close()

    @contextlib.contextmanager
    def contained(self) -> Any:
        """Turns redis-py's errors into ours, except those of a command itself (ResponseError)."""
        try:
            yield
        except (AuthenticationError, AuthorizationError) as error:
            raise Refused(
                f"{self.shown} does not accept this user name or password ({error}): put them into the address, or "
                f"the password into ${PASSWORD_VARIABLE}"
            ) from None
        except (
            *(ConnectionError, TimeoutError, OSError, RedisClusterException, ClusterError),
            # Damaged bytes are not an answer of a Redis server.
            InvalidResponse,
        ) as error:
            raise Unreachable(_reason(self.shown, error)) from None


class RedisConnections:
    """One thread's connections. Only `close` may be called from another thread."""

    def __init__(self, server: RedisConnector) -> None:
        self._server = server
        # Clients and their connections, by the client's `id`. A client that is kept here keeps its `id`.
        self._connections: dict[int, tuple[redis.Redis, Any]] = {}
        self._closed = False

    def post(self, command: Command) -> bool:
        """Sends a command whose answer the next `run` reads. False if its connection is not there."""
        _, connection = self._connections.get(id(self._server.single), (None, None))
        if connection is None or not connection.is_connected:
            return False
        with contextlib.suppress(Exception):
            # If it breaks or is closed meanwhile, `run` notices.
            connection.send_packed_command(connection.pack_commands([command[1]]))
        return True

    def run(self, commands: Sequence[Command], posted: int = 0) -> list[Any]:
        """Sends commands, and reads their answers: raw, or a ResponseError for one that failed.

        Args:
            commands: some of them may have been posted already.
            posted: how many of the first commands were; only their answers are read.

        Raises:
            Unreachable: the server did not answer. Some of the commands may have been run.
            Refused: the server does not accept this user.
        """
        answers: list[Any] = [None] * len(commands)
        left = list(range(len(commands)))
        for _ in range(REDIRECTIONS):
            for client, numbers in self._by_holder(commands, left):
                exchanged = self._exchange(client, commands, numbers, posted)
                for number, answer in zip(numbers, exchanged, strict=True):
                    answers[number] = answer
            posted = 0
            left = [number for number in left if isinstance(answers[number], _ELSEWHERE)]
            if not left:
                return answers
            self._server.look_again()
        raise Unreachable(f"{self._server.shown} is being rearranged: {answers[left[0]]}")

    def run_allowed(self, commands: Sequence[Command]) -> list[Any]:
        """As `run`, but raises Refused if the user lacks the permission for one of the commands."""
        answers = self.run(commands)
        for answer in answers:
            failed(answer)
        return answers

    def _by_holder(
        self, commands: Sequence[Command], numbers: Iterable[int]
    ) -> list[tuple[redis.Redis, list[int]]]:
        groups: dict[int, tuple[redis.Redis, list[int]]] = {}
        for number in numbers:
            client = self._server.holder(commands[number][0])
            groups.setdefault(id(client), (client, []))[1].append(number)
        return list(groups.values())

    def _exchange(
        self, client: redis.Redis, commands: Sequence[Command], numbers: Sequence[int], posted: int
    ) -> list[Any]:
        answers: list[Any] = []
        try:
            with self._server.contained():
                connection = self._connection(client, may_connect=not posted)
                unsent = [commands[n][1] for n in numbers if n >= posted]
                connection.send_packed_command(connection.pack_commands(unsent))
                for _ in numbers:
                    try:
                        answers.append(connection.read_response(disconnect_on_error=True))
                    except ReadOnlyError as error:
                        raise ConnectionError("the server is a replica now") from error
                    except ResponseError as error:
                        answers.append(error)
        except BaseException:
            # Answers that were not read must not be taken for those of later commands.
            self.disconnect()
            with contextlib.suppress(BrokerUnreachable):
                self._server.look_again()
            raise
        return answers

    def _connection(self, client: redis.Redis, may_connect: bool) -> Any:
        if self._closed:
            raise ConnectionError("closed")
        if id(client) not in self._connections:
            self._connections[id(client)] = client, new_connection(client, LARGE)
        connection = self._connections[id(client)][1]
        if not (may_connect or connection.is_connected):
            raise ConnectionError("the connection broke")
        # Sending connects, too, but to the master that Sentinels named last time.
        connection.connect()
        return connection

    def disconnect(self) -> None:
        """Closes the connections. The next command makes new ones."""
        for _, connection in list(self._connections.values()):
            connection.disconnect()

    def close(self) -> None:
        """Closes the connections for good. A command that waits ends."""
        self._closed = True
        self.disconnect()


def failed(answer: object) -> str:
    """The error message in a command's answer; empty if the command did not fail.

    Raises:
        Refused: the user lacks a permission.
    """
    if isinstance(answer, NoPermissionError):
        raise Refused(f"its user lacks a permission (see `lambda-split redis-acl`): {answer}")
    return str(answer) if isinstance(answer, ResponseError) else ""


def _options(address: RedisAddress) -> dict[str, Any]:
    scheme = "rediss" if address.tls else "redis"
    user = f"{address.user}@" if address.user else ""
    try:
        options: dict[str, Any] = parse_url(f"{scheme}://{user}host:1?{address.query}")
    except ValueError as error:
        raise ConfigError(f"the Redis address has a wrong option: {error}") from None
    for name in ("host", "port", "connection_class"):
        options.pop(name, None)
    if not options.get("password") and (password := os.environ.get(PASSWORD_VARIABLE)):
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


def _sentinel(address: RedisAddress, options: dict[str, Any]) -> redis.Redis:
    """A client of the master. The Sentinels may have their own user names and passwords."""
    names = {"sentinel_username": "username", "sentinel_password": "password"}
    own = {to: options.pop(name) for name, to in names.items() if name in options}
    shared = {name: value for name, value in options.items() if name not in ("username", "password", "db")}
    sentinels = Sentinel(list(address.hosts), sentinel_kwargs={**shared, **own}, **options)
    client: redis.Redis = sentinels.master_for(address.service)
    return client


def _reason(shown: str, error: Exception) -> str:
    """The message for a missing answer, with what to do."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            why = getattr(cause, "verify_message", "") or cause.reason or str(cause)
            return f"no TLS connection to {shown}: {why} (is it a TLS port? ?ssl_ca_certs=FILE names the CA)"
        cause = cause.__cause__ or cause.__context__
    return f"no answer from {shown}: {error}"

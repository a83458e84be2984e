"""A wide-area network on one machine: forwards IP packets between two network namespaces, late and at a rate.

Run as a script by `benchmarks.network`. It makes two namespaces without names, `near` and `far`, with a TUN device
each, and is all that lies between them. So nothing is left when it ends, however it ends. Each line of JSON on its
stdin sets how packets travel (fields of `Weather`), and is answered by a line: what has passed so far. It ends with
its stdin.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

#: unshare(2), <linux/sched.h>: a network namespace of this process's own.
CLONE_NEWNET = 0x40000000

#: ioctl(2) on /dev/net/tun, <linux/if_tun.h>: names the device; packets are IP, without a header before them.
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000

#: The two ends, and their addresses: of RFC 5737's, which nobody has.
ADDRESSES = {"near": "192.0.2.1", "far": "192.0.2.2"}

#: Bytes of the largest packet, as on Ethernet.
MTU = 1500

#: What senders do to find out how fast they may send: Linux's default, whatever this machine has chosen.
CONGESTION_CONTROL = "cubic"

#: Packets that the kernel keeps for this process, while it has no processor.
KERNEL_QUEUE = 2000

#: Bytes that may leave at once after the link was idle, so that a late wake-up of this process costs no rate.
BURST = 32 * 1024

#: Packets that are taken from one side before the other one has its turn.
TURN = 64


@dataclass(frozen=True)
class Weather:
    """How packets travel, in both directions alike."""

    #: Seconds from one end to the other: half a round trip.
    delay: float = 0.0
    #: Bits per second; 0 for no limit.
    rate: float = 0.0
    #: Share of packets that are lost, drawn for each.
    loss: float = 0.0
    #: Bytes that wait for the link at most; packets beyond that are lost.
    buffer: int = 1024 * 1024


@dataclass
class Passed:
    """What went in one direction: IP packets and their bytes, and packets lost by chance and in a full buffer."""

    packets: int = 0
    bytes: int = 0
    lost: int = 0
    overflowed: int = 0


@dataclass
class Direction:
    """Packets from one device to the other one: they wait in a heap until they are due.

    Args:
        source, sink: file descriptors of TUN devices that do not block.
        draw: which packets are lost.
    """

    source: int
    sink: int
    draw: random.Random
    passed: Passed = field(default_factory=Passed)
    #: When the link has sent what it has accepted, by `time.monotonic`.
    _free_at: float = 0.0
    _due: list[tuple[float, int, bytes]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)

    def take(self, weather: Weather, now: float) -> None:
        """Takes what the source has sent, at a time by `time.monotonic`."""
        for _ in range(TURN):
            try:
                packet = os.read(self.source, MTU)
            except BlockingIOError:
                return
            self._accept(packet, now, weather)

    def _accept(self, packet: bytes, now: float, weather: Weather) -> None:
        """Puts a packet into the heap, unless it is lost. A token bucket of `BURST` bytes limits the rate."""
        if weather.loss and self.draw.random() < weather.loss:
            self.passed.lost += 1
            return
        leaves = now
        if weather.rate:
            seconds_per_byte = 8 / weather.rate
            if self._free_at - now > weather.buffer * seconds_per_byte:
                self.passed.overflowed += 1
                return
            self._free_at = max(self._free_at, now - BURST * seconds_per_byte) + len(packet) * seconds_per_byte
            leaves = max(now, self._free_at)
        heapq.heappush(self._due, (leaves + weather.delay, next(self._order), packet))

    def deliver(self, now: float) -> float | None:
        """Hands the sink what is due. Returns when the next packet is; None if there is none."""
        while self._due and self._due[0][0] <= now:
            _, _, packet = heapq.heappop(self._due)
            try:
                os.write(self.sink, packet)
            except OSError:
                # The namespace has no room for it, or its device is down: as on any network, it is lost.
                self.passed.overflowed += 1
                continue
            self.passed.packets += 1
            self.passed.bytes += len(packet)
        return self._due[0][0] if self._due else None


def make_end(name: str) -> tuple[int, int]:
    """Moves this process into a new namespace with a TUN device; returns both as file descriptors.

    Raises:
        OSError: this process may not do that, or the kernel has no TUN devices.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"wan", IFF_TUN | IFF_NO_PI))
    here, there = ADDRESSES[name], next(ADDRESSES[other] for other in ADDRESSES if other != name)
    for command in (
        "link set lo up",
        f"addr add {here} peer {there} dev wan",
        f"link set wan mtu {MTU} txqueuelen {KERNEL_QUEUE} up",
        f"route replace {there} dev wan src {here} congctl {CONGESTION_CONTROL}",
    ):
        subprocess.run(["ip", *command.split()], check=True, stdin=subprocess.DEVNULL)
    return os.open("/proc/self/ns/net", os.O_RDONLY), tun


def forward(up: Direction, down: Direction) -> None:
    """Forwards until stdin ends."""
    weather, commands = Weather(), b""
    while True:
        now = time.monotonic()
        times = [at for at in (up.deliver(now), down.deliver(now)) if at is not None]
        timeout = max(0.0, min(times) - time.monotonic()) if times else None
        readable, _, _ = select.select([up.source, down.source, 0], [], [], timeout)
        for direction in (up, down):
            if direction.source in readable:
                direction.take(weather, time.monotonic())
        if 0 in readable:
            read = os.read(0, 65536)
            if not read:
                return
            *lines, commands = (commands + read).split(b"\n")
            for line in lines:
                weather = Weather(**(asdict(weather) | json.loads(line)))
                _say({"up": asdict(up.passed), "down": asdict(down.passed)})


def main(seed: int) -> None:
    near_ns, near = make_end("near")
    far_ns, far = make_end("far")
    prefix = f"/proc/{os.getpid()}/fd"
    up = Direction(near, far, random.Random(seed))
    down = Direction(far, near, random.Random(seed + 1))
    _say({"near": f"{prefix}/{near_ns}", "far": f"{prefix}/{far_ns}"})
    forward(up, down)


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""Overhead of the queue: round trips through each transport, compared with a plain echo and encryption.

A device's session sends steps to a worker that returns them at once: sealed end to end, with credits and
heartbeats, through a broker (with CURVE on TCP, without on ipc) or a Redis server. The same number of bytes also
goes through a plain echo with the same security of the socket (ROUTER and ROUTER of pyzmq with two frames, or XADD
and XREAD), and through four passes of the fastest AEAD (sealed and opened, there and back). The three are measured
in turn, for a few milliseconds each, because the machine's speed and the placement of processes change. A round's
ratio is the first's median over the sum of the other two medians; the result is the median over all rounds,
with its quartiles as spread.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.harness import note, queue_server, report, spread
from split_common.protocol import encoding, headers, payloads
from split_common.protocol.channel import SUITES, Box, preferred_suites
from split_common.system.process import passive_threads, reuse_memory
from split_common.transport import connect
from split_common.transport.zmq_socket import curve_client, curve_z85
from split_common.trust.fleet import load_fleet
from split_common.trust.keys import Role

#: Bytes of hidden states in a message, and number of round trips in a round.
SIZES = {"2k": (2048, 50), "64k": (65536, 25), "1m": (1024 * 1024, 8)}

#: Width of the hidden states: float32.
WIDTH = 512

#: First frame of the plain echo, as long as the header of a step.
HEADER = bytes(33)

#: Number of steps that are sent at once to measure round trips per second.
BURST = 32

#: A service without a model.
SERVICE = headers.Service(b"nothing is computed by this body", 0, 1)

RoundTrip = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument(
        "--rounds", type=int, default=40, help="number of rounds, in which each is measured in turn"
    )
    parser.add_argument("--share", type=float, default=1.0, help="share of a round's round trips to make")
    parser.add_argument("--transports", default="zmq,ipc,redis")
    parser.add_argument("--role", choices=sorted(_ROLES), help="used by the benchmark itself")
    parser.add_argument("--address", default="")
    options = parser.parse_args()
    passive_threads()
    # As the commands do.
    reuse_memory()
    if options.role:
        _ROLES[options.role](options.address)
        return
    results: dict[str, Any] = {"aead": preferred_suites()[0]}
    for transport in options.transports.split(","):
        results |= _measure(transport, options)
    report(results, options.json, "queue, round trips on loopback")


def _measure(transport: str, options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    box = Box(SUITES[preferred_suites()[0]], bytes(range(32)))
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        address = stack.enter_context(queue_server(transport, directory))
        stack.enter_context(_process("worker", address))
        session = stack.enter_context(_session(address))
        plain = stack.enter_context(_PLAIN[transport](address))
        for size, (count, trips) in SIZES.items():
            trips = max(2, int(trips * options.share))
            step = _step(count)
            bare = bytes(count)
            rounds: list[tuple[float, float, float]] = []
            rates = []
            for _ in range(options.rounds):
                whole = _median_ms(partial(session.call, [step]), trips)
                echo = _median_ms(partial(plain, bare), trips)
                rounds.append((whole, echo, _median_ms(partial(_four_passes, box, bare), trips)))
                began = time.perf_counter()
                session.call([step] * BURST)
                rates.append(BURST / (time.perf_counter() - began))
            ratios = [whole / (echo + passes) for whole, echo, passes in rounds]
            ratio = statistics.median(ratios)
            whole, echo, passes = map(statistics.median, zip(*rounds, strict=True))
            results |= {
                f"{transport}_ms_{size}": round(whole, 3),
                f"{transport}_per_s_{size}": round(statistics.median(rates), 1),
                f"{transport}_plain_ms_{size}": round(echo, 3),
                f"{transport}_aead_ms_{size}": round(passes, 3),
                f"{transport}_ratio_{size}": round(ratio, 2),
                f"{transport}_ratio_{size}_spread": [round(quartile, 2) for quartile in spread(ratios)],
            }
            note(
                f"{transport} {size}: {whole:.3f} ms, plain {echo:.3f} ms, four passes {passes:.3f} ms: {ratio:.2f}"
            )
    return results


def _median_ms(what: RoundTrip, times: int) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        what()
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds)


def _four_passes(box: Box, plaintext: bytes) -> None:
    for counter in (1, 2):
        box.open(counter, HEADER, box.seal(counter, HEADER, plaintext))


# --- everything on -----------------------------------------------------------------------------------------


def _step(count: int) -> tuple[payloads.Step, bytes]:
    tokens = count // (4 * WIDTH)
    return payloads.Step("float32", WIDTH, [payloads.Run(0, 0, list(range(tokens)))]), bytes(count)


@contextlib.contextmanager
def _session(address: str) -> Iterator[Any]:
    from split_device.sessions.client import Client

    fleet = load_fleet()
    identity = fleet.identity("device")
    transport = connect(address, fleet, identity)
    client = Client(transport, fleet, identity, SERVICE, "nothing", "float32")
    client.start()
    try:
        yield client.open_session()
    finally:
        client.close()


def _be_a_worker(address: str) -> None:
    from split_worker.worker import Worker

    class Echo(Worker):
        """Returns each step's states, on the transport's thread."""

        def _request(self, header: headers.Relay, body: bytes) -> None:
            channel = self._channels.open[header.sender, header.channel].channel
            keys = sessions.get(header.session) or channel.epoch_keys(header.session, header.epoch)
            sessions[header.session] = keys
            request, tensor = encoding.decode_payload(keys.open(header, body), encoding.request_decoder)
            if isinstance(request, payloads.Step):
                self._reply(keys, header, payloads.Result(request.dtype, request.tokens, request.width), tensor)

    sessions: dict[headers.SessionRef, Any] = {}
    fleet = load_fleet()
    identity = fleet.identity("worker")
    body: Any = SimpleNamespace(
        store=SimpleNamespace(free_tokens=2**20, sequence_tokens=0, freed_by=lambda _closed: 0),
        device=SimpleNamespace(type="cpu"),
        divisible=True,
        first_turn=1.0,
        lacks=frozenset(),
    )
    worker = Echo(body, SERVICE, "nothing", identity, fleet, connect(address, fleet, identity))
    worker.start()
    _wait_for_the_end()
    worker.stop()


# --- plain -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _plain_zmq(address: str) -> Iterator[Callable[[bytes], object]]:
    import zmq

    with _process("plain-broker", address) as ports:
        front, back = ports.split()
        with _process("plain-echo", back), zmq.Context() as context, context.socket(zmq.DEALER) as sock:
            _connect(sock, front, "device")

            def trip(body: bytes) -> None:
                sock.send_multipart([HEADER, body])
                sock.recv_multipart()

            yield trip


def _connect(sock: Any, address: str, role: Role) -> None:
    """Connects like the link: with CURVE over TCP; over ipc the directory's mode protects the socket."""
    fleet = load_fleet()
    if address.startswith("tcp://"):
        curve_client(sock, fleet, fleet.identity(role))
    sock.linger = 0
    sock.connect(address)


def _be_a_plain_broker(address: str) -> None:
    import zmq

    curve = address.startswith("tcp://")
    _, secret = curve_z85(load_fleet().identity("broker"))
    with zmq.Context() as context, context.socket(zmq.ROUTER) as front, context.socket(zmq.ROUTER) as back:
        for sock, name in ((front, "front"), (back, "back")):
            sock.linger = 0
            if curve:
                sock.curve_server, sock.curve_secretkey = True, secret
            sock.bind("tcp://127.0.0.1:*" if curve else f"{address}-{name}")
        print(*(sock.getsockopt_string(zmq.LAST_ENDPOINT) for sock in (front, back)), flush=True)
        worker = back.recv_multipart()[0]
        poller = zmq.Poller()
        for file in (front, back, sys.stdin.fileno()):
            poller.register(file, zmq.POLLIN)
        while sys.stdin.fileno() not in (events := dict(poller.poll())):
            if front in events:
                back.send_multipart([worker, *front.recv_multipart()])
            if back in events:
                front.send_multipart(back.recv_multipart()[1:])


def _be_a_plain_echo(address: str) -> None:
    import zmq

    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        _connect(sock, address, "worker")
        sock.send(b"here")
        print("ready", flush=True)
        poller = zmq.Poller()
        poller.register(sock, zmq.POLLIN)
        poller.register(sys.stdin.fileno(), zmq.POLLIN)
        while sys.stdin.fileno() not in dict(poller.poll()):
            sock.send_multipart(sock.recv_multipart())


@contextlib.contextmanager
def _plain_redis(address: str) -> Iterator[Callable[[bytes], object]]:
    import redis

    with _process("plain-redis", address), redis.Redis.from_url(address) as client:
        last = "0"

        def trip(body: bytes) -> None:
            nonlocal last
            client.xadd("there", {"b": body}, maxlen=1, approximate=False)
            [[_, [(last, _)]]] = client.xread({"back": last}, block=10_000)

        yield trip


def _be_a_plain_redis_echo(address: str) -> None:
    import select

    import redis

    with redis.Redis.from_url(address) as client:
        print("ready", flush=True)
        last = "0"
        while not select.select([sys.stdin], [], [], 0)[0]:
            if arrived := client.xread({"there": last}, block=500):
                [[_, [(last, fields)]]] = arrived
                client.xadd("back", fields, maxlen=1, approximate=False)


_ROLES: dict[str, Callable[[str], None]] = {
    "worker": _be_a_worker,
    "plain-broker": _be_a_plain_broker,
    "plain-echo": _be_a_plain_echo,
    "plain-redis": _be_a_plain_redis_echo,
}
_PLAIN = {"zmq": _plain_zmq, "ipc": _plain_zmq, "redis": _plain_redis}


@contextlib.contextmanager
def _process(role: str, address: str) -> Iterator[str]:
    """Runs a role in a process, which ends with its stdin; yields the line that it prints when it is ready."""
    command = [sys.executable, "-m", "benchmarks.queue", "--role", role, "--address", address]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {role} did not start")
        yield line
    finally:
        process.communicate()


def _wait_for_the_end() -> None:
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

"""The parts of the stress command by themselves: faults, processes, what is counted, what is reported."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from fleet import running_broker, start_worker
from split_common.cli import main
from split_common.errors import ConfigError, SplitError
from split_common.models.split import DEFAULT_LAYERS
from split_common.system.servers import free_port
from split_device.cli.stress import parse_chaos
from split_device.stress import images, tiny_model, tiny_unet
from split_device.stress.chaos import INTERVALS, Chaos
from split_device.stress.device import run_device
from split_device.stress.events import Answered, Asked, Decoded, Failed, Traffic, decode, encode
from split_device.stress.ledger import Ledger
from split_device.stress.memory import MIB, Memory, Resident
from split_device.stress.plan import FAULTS, StressPlan
from split_device.stress.plot import draw
from split_device.stress.processes import Supervised
from split_device.stress.proxy import Proxy
from split_device.stress.report import percentiles, report
from split_device.stress.workload import draw as draw_request
from split_worker.worker import Worker
from wiretap import LATE, wait_until

RNG = random.Random(0)

# --- the proxy ---------------------------------------------------------------------------------------------


class Echo:
    """A TCP server that sends back what it gets, as one object for each connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._listener.accept()
                self._sockets.append(peer)
                threading.Thread(target=self._echo, args=(peer,), daemon=True).start()

    def _echo(self, peer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := peer.recv(65536):
                peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    proxy = Proxy("127.0.0.1", echo.port)
    yield proxy
    proxy.close()


@pytest.fixture
def peer(proxy: Proxy) -> Iterator[socket.socket]:
    """A connection through the proxy that has carried something."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=LATE) as sock:
        assert exchange(sock, b"hello") == b"hello"
        yield sock


def exchange(sock: socket.socket, data: bytes) -> bytes:
    """What comes back of some bytes: all, or what came until the connection ended."""
    sock.sendall(data)
    return read(sock, len(data))


def read(sock: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count and (data := sock.recv(count - len(got))):
        got += data
    return got


def test_the_proxy_forwards(peer: socket.socket) -> None:
    data = RNG.randbytes(1 << 20)
    sender = threading.Thread(target=peer.sendall, args=(data,))
    sender.start()
    assert read(peer, len(data)) == data
    sender.join()


def test_the_end_of_one_side_is_the_end_of_the_other(peer: socket.socket) -> None:
    peer.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""


def test_lag_holds_back_and_passes(proxy: Proxy, peer: socket.socket) -> None:
    class Always(random.Random):
        def random(self) -> float:
            return 0.0

    def exchanged() -> float:
        """Seconds that it takes."""
        began = time.monotonic()
        assert exchange(peer, b"data") == b"data"
        return time.monotonic() - began

    assert proxy.lag(Always(), delay=0.2, seconds=600.0) == 1
    assert exchanged() >= 0.4
    # A later one ends this one, too.
    assert proxy.lag(Always(), delay=0.2, seconds=0.0) == 1
    wait_until(lambda: exchanged() < 0.2)


def test_reset(proxy: Proxy, peer: socket.socket) -> None:
    assert proxy.reset(RNG) == 1
    with pytest.raises(ConnectionResetError):
        peer.recv(1)


def test_truncation_lets_half_pass(proxy: Proxy, peer: socket.socket) -> None:
    assert proxy.truncate(RNG) == 1
    peer.sendall(bytes(100))
    got = b""
    with contextlib.suppress(ConnectionResetError):
        got = read(peer, 100)
    assert len(got) <= 50
    # The connection is over.
    with contextlib.suppress(ConnectionResetError):
        assert peer.recv(1) == b""


def test_a_blackhole_swallows_and_ends_in_a_reset(proxy: Proxy, peer: socket.socket) -> None:
    began = time.monotonic()
    assert proxy.blackhole(RNG, seconds=0.5) == 1
    peer.sendall(b"lost")
    with pytest.raises(ConnectionResetError):
        peer.recv(1)
    assert time.monotonic() - began >= 0.5


def test_corruption_flips_one_bit_once(proxy: Proxy, peer: socket.socket) -> None:
    data = RNG.randbytes(1000)
    assert proxy.corrupt(RNG) == 1
    damaged = exchange(peer, data)
    assert len(damaged) == len(data)
    assert sum((a ^ b).bit_count() for a, b in zip(data, damaged, strict=True)) == 1
    assert exchange(peer, data) == data


def test_without_connections_nothing_is_struck(proxy: Proxy) -> None:
    assert [proxy.reset(RNG), proxy.truncate(RNG), proxy.corrupt(RNG), proxy.blackhole(RNG, 1)] == [0] * 4
    assert proxy.lag(RNG, 1, 1) == 0


def test_a_queue_that_is_away_refuses_and_comes_back() -> None:
    port = free_port()
    proxy = Proxy("127.0.0.1", port)
    here = "127.0.0.1", proxy.port
    try:
        with socket.create_connection(here, timeout=LATE) as peer, contextlib.suppress(OSError):
            assert peer.recv(1) == b""
        with socket.create_server(("127.0.0.1", port)) as back:
            back.settimeout(LATE)
            with socket.create_connection(here, timeout=LATE) as peer:
                far, _ = back.accept()
                with far:
                    peer.sendall(b"x")
                    assert far.recv(1) == b"x"
    finally:
        proxy.close()


# --- chaos -------------------------------------------------------------------------------------------------


class Victim:
    """Notes what is done to it."""

    def __init__(self) -> None:
        self.running = True
        self.done: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.done.append(name) or 1


def test_the_same_seed_draws_the_same_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("split_device.stress.chaos.INTERVALS", dict.fromkeys(INTERVALS, (0.05, 0.1)))

    def strike(seed: int) -> list[str]:
        workers: list[Any] = [Victim(), Victim()]
        chaos = Chaos(list(FAULTS), seed, workers, Victim(), Victim())  # type: ignore[arg-type]
        chaos.start()
        wait_until(lambda: set(chaos.counts) >= {"kill", "stop", "broker", "lag", "corruption"})
        wait_until(lambda: len(chaos.history) >= 12)
        chaos.close()
        assert sum(chaos.counts.values()) == len(chaos.history)
        # What is stopped goes on, at the end at the latest.
        assert all(worker.done[-1] == "resume" for worker in workers)
        return [kind for _, kind in chaos.history][:12]

    first = strike(3)
    assert first == strike(3)
    assert first != strike(4)


def test_the_last_worker_that_runs_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("split_device.stress.chaos.INTERVALS", dict.fromkeys(INTERVALS, (0.01, 0.02)))
    workers: list[Any] = [Victim(), Victim()]
    workers[1].running = False
    chaos = Chaos(["kill", "stop"], 0, workers, None, None)
    chaos.start()
    time.sleep(0.2)
    chaos.close()
    assert not chaos.history


def test_faults_that_can_be_asked_for() -> None:
    assert parse_chaos(None, True, None) == list(FAULTS) == list(INTERVALS)
    assert parse_chaos("none", True, None) == []
    assert parse_chaos("lag, kill,kill", True, None) == ["lag", "kill"]
    assert parse_chaos(None, False, "tcp://127.0.0.1:7411") == ["lag", "drop", "corrupt"]
    assert parse_chaos(None, True, "rediss://there:6379") == ["kill", "stop"]
    for text, workers, broker in [
        ("boom", True, None),
        ("kill", False, "tcp://127.0.0.1:7411"),
        ("broker", True, "tcp://127.0.0.1:7411"),
        ("drop", True, "ipc:///run/queue"),
    ]:
        with pytest.raises(ConfigError, match=f"--chaos {text}"):
            parse_chaos(text, workers, broker)


# --- processes ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sleeper() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_kept_process_is_started_again() -> None:
    supervised = Supervised("sleeper", sleeper)
    supervised.start()
    try:
        supervised.wait()
        assert supervised.process is not None
        first = supervised.process
        supervised.stop()
        assert supervised.stopped
        assert not supervised.running
        supervised.resume()
        assert supervised.running
        supervised.kill()
        wait_until(lambda: supervised.process is not None)
        assert supervised.process.pid != first.pid
        second = supervised.process
        supervised.stop()
    finally:
        supervised.end()
        supervised.join()
    assert second.poll() is not None


def test_a_process_that_cannot_be_started_says_why() -> None:
    @contextlib.contextmanager
    def broken() -> Iterator[subprocess.Popen[str]]:
        raise SplitError("no such thing")
        yield

    supervised = Supervised("broken", broken)
    supervised.start()
    with pytest.raises(SplitError, match="no such thing"):
        supervised.wait()
    supervised.join()


def test_memory_is_compared_with_that_after_ten_seconds() -> None:
    assert Resident("young", None, 100 * MIB).within
    assert Resident("small", 100 * MIB, 116 * MIB).within
    assert not Resident("grown", 100 * MIB, 117 * MIB).within
    assert Resident("large", 1000 * MIB, 1100 * MIB).within
    assert not Resident("shrunk", 1000 * MIB, 800 * MIB).within


def test_memory_of_what_is_there_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("split_device.stress.memory.SETTLED", 0.0)
    memory = Memory()
    supervised = Supervised("worker 0", sleeper)
    supervised.start()
    try:
        supervised.wait()
        memory.sample([supervised])
        [resident] = memory.residents
        assert resident.settled == resident.last > 0
        supervised.process = None
        memory.sample([supervised])
        assert not memory.residents
    finally:
        supervised.end()
        supervised.join()


# --- what is asked for -------------------------------------------------------------------------------------


def test_images_are_drawn_and_compared(tmp_path: Path) -> None:
    one, two = (
        UNet2DConditionModel.from_pretrained(tiny_unet.build(tmp_path / str(seed), seed)).eval() for seed in (0, 1)
    )
    requests = [images.draw(0, 1, number, one.config) for number in range(8)]
    shapes = set()
    for request in requests[:4]:
        wanted = request.run(one)
        shapes.add(wanted.shape)
        again = images.draw(0, 1, requests.index(request), one.config).run(one)
        assert images.agree(again, wanted)
        assert not images.agree(request.run(two), wanted)
        assert not images.agree(wanted + 1e-4 * wanted.abs().max(), wanted)
        assert not images.agree(wanted[:, :, 1:], wanted)
    assert len(shapes) > 1
    assert len({request.steps for request in requests}) > 1


def test_every_other_process_of_a_mixed_run_has_images() -> None:
    plan = StressPlan("mixed", 4, 4, None, 1.0, "zmq", None, None, None, DEFAULT_LAYERS, [], 0, None)
    assert [plan.kind(index) for index in range(4)] == ["text", "image", "text", "image"]
    assert main(["stress", "--workload", "mixed", "--workers", "1"]) == 2
    assert main(["stress", "--workload", "mixed", "--model", "x"]) == 2


# --- ledger and report -------------------------------------------------------------------------------------


def answered(number: int, **changes: Any) -> Answered:
    facts: dict[str, Any] = {
        "tokens": 10,
        "wanted": 10,
        "equal": True,
        "seconds": 1.0,
        "gaps": [0.1],
        "recoveries": [],
    }
    return Answered(number, **(facts | changes))


def test_events_come_back_as_they_were() -> None:
    events = [Asked(1), Decoded(3), answered(1, recoveries=[0.5]), Failed(2, "Busy: full"), Traffic(1, 2, 3)]
    assert [decode(encode(event)) for event in events] == events
    assert all("\n" not in encode(event) for event in events)


def summed(ledger: Ledger) -> Any:
    return report("zmq", 7, 10.0, ledger, None, [], None, interrupted=False)


def test_all_is_well() -> None:
    ledger = Ledger()
    for device in (0, 1):
        for number in range(2):
            ledger.take(device, Asked(number))
            ledger.take(device, answered(number))
        ledger.take(device, Traffic(100, 200, 3))
    result = summed(ledger)
    assert (result.requests, result.completed, result.tokens, result.replays) == (4, 4, 40, 6)
    assert (result.lost, result.duplicated, result.mismatched) == (0, 0, 0)
    assert (result.bytes_sent, result.bytes_received, result.tokens_per_second) == (200, 400, 4.0)
    assert (result.images, result.steps) == (0, 0)
    ledger.take(0, Asked(2))
    ledger.take(0, answered(2, tokens=0, wanted=0, steps=5))
    drawn = summed(ledger)
    assert (drawn.requests, drawn.tokens, drawn.images, drawn.steps) == (5, 40, 1, 5)
    assert drawn.steps_per_second == 0.5
    assert result.sound
    assert json.loads(json.dumps(result.facts()))["request_ms"]["p50"] == 1000.0


@pytest.mark.parametrize(
    ("events", "key"),
    [
        ([Asked(0)], "lost"),
        ([Asked(0), Failed(0, "SessionLost: gone")], "lost"),
        ([Asked(0), answered(0), answered(0)], "duplicated"),
        ([Asked(0), answered(0, tokens=11)], "duplicated"),
        ([Asked(0), answered(0, equal=False)], "mismatched"),
    ],
)
def test_what_goes_wrong_is_counted_under_its_name(events: list[Any], key: str) -> None:
    ledger = Ledger()
    for event in events:
        ledger.take(0, event)
    result = summed(ledger)
    wrong = {name: getattr(result, name) for name in ("lost", "duplicated", "mismatched")}
    assert wrong == {"lost": 0, "duplicated": 0, "mismatched": 0} | {key: 1}
    assert not result.sound


def test_percentiles_are_by_nearest_rank() -> None:
    assert percentiles([]) == {"p50": None, "p90": None, "p99": None, "max": None}
    assert percentiles([0.001]) == {"p50": 1.0, "p90": 1.0, "p99": 1.0, "max": 1.0}
    hundred = [number / 1000 for number in range(100, 0, -1)]
    assert percentiles(hundred) == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}


def test_requests_are_drawn_from_the_seed() -> None:
    def arguments(*where: int) -> Any:
        request = draw_request(*where, vocabulary=128)
        return request.prompt.tolist(), sorted(request.options)

    assert arguments(7, 0, 0) == arguments(7, 0, 0)
    assert len({str(arguments(7, device, number)) for device in range(4) for number in range(4)}) == 16
    ways = {tuple(arguments(7, 0, number)[1]) for number in range(30)}
    assert len(ways) == 3  # plain and batches, beams, lookup
    assert any(len(draw_request(7, 0, number, 128).prompt) > 1 for number in range(30))


def test_the_random_model_is_its_seeds(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    def weights(name: str, seed: int) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tiny_model.build(tmp_path / name, seed))
        return model.model.embed_tokens.weight

    first = weights("a", 1)
    assert torch.equal(first, weights("b", 1))
    assert not torch.equal(first, weights("c", 2))


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ledger = Ledger()
    ledger.decoded = [(second / 4, 20) for second in range(80)]
    chaos: Any = SimpleNamespace(history=[(ledger.began + 3, "kill"), (ledger.began + 9, "lag")])
    draw(tmp_path / "out.png", ledger, chaos, 20.0)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot draw"):
        draw(tmp_path / "out.unknown", ledger, None, 20.0)


# --- the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers 0 needs --broker"),
        (["--workers", "0", "--broker", "tcp://127.0.0.1:7411"], "needs --model"),
        (["--keys", "somewhere"], "--keys needs --broker"),
        (["--chaos", "boom"], "--chaos boom"),
        (["--plot", "/no/such/directory/out.png"], "not a directory"),
        (["--plot", "out.movie"], "invalid plot file"),
        (["--transport", "pigeon"], "pigeon"),
        (["--devices", "0"], "devices"),
        (["--hostile", "kindness"], "invalid --hostile kindness"),
        (["--hostile", ""], "invalid --hostile"),
        (["--hostile", "redis-memory"], "--hostile redis-memory: it needs --transport redis"),
        (["--hostile", "multipart", "--transport", "redis"], "--hostile multipart: it needs --transport zmq"),
        (["--hostile", "image-steps"], "--hostile image-steps: it needs --workload image"),
        (["--hostile", "all", "--broker", "tcp://127.0.0.1:7411"], "--hostile makes a fleet of its own"),
        (["--hostile", "kv", "--chaos", "boom"], "--chaos boom"),
    ],
)
def test_wrong_options_start_nothing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["stress", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_without_matplotlib_plot_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert main(["stress", "--plot", "out.png"]) == 2
    assert "pip install 'lambda-split[plot]'" in capsys.readouterr().err


# --- devices -----------------------------------------------------------------------------------------------


def test_a_device_that_joins_while_all_workers_are_away_waits_for_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_model.build(tmp_path / "model", 0)
    workers: list[Worker] = []
    with running_broker() as broker:

        def join() -> None:
            wait_until(lambda: broker.counters["bounced_no-worker"])
            workers.append(start_worker(checkpoint, broker.address))

        joining = threading.Thread(target=join)
        joining.start()
        try:
            run_device(
                str(checkpoint),
                broker.address,
                0,
                kind="text",
                seed=0,
                requests=1,
                reference=None,
                layers=DEFAULT_LAYERS,
                keys=None,
            )
        finally:
            joining.join()
            for worker in workers:
                worker.stop()
    # The first line says that the process is ready.
    _, *lines = capsys.readouterr().out.splitlines()
    (answered,) = [event for event in map(decode, lines) if isinstance(event, Answered)]
    assert answered.equal

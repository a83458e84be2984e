"""The parts of `lambda-split stress --hostile`: modes, slices, what is counted, and the verdict."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from rich.console import Console

import tiny
from split_common.cli import main
from split_common.errors import AuthenticationError, ConfigError, SplitError
from split_common.protocol import headers
from split_common.system.servers import RedisServer
from split_common.transport import new_peer_id
from split_common.trust.fleet import Fleet
from split_device.sessions.client import Client
from split_device.stress.events import Answered, Asked, Decoded, Failed
from split_device.stress.hostile import outcome, slices
from split_device.stress.hostile.curve import CurveConnection
from split_device.stress.hostile.fleet import HOSTILE, REDIS_LIMITS, Commands, Target
from split_device.stress.hostile.modes import MODES, described, parse_modes
from split_device.stress.hostile.outcome import GROWTH, MIB, HostileOutcome, ModeOutcome, Peaks, Window
from split_device.stress.hostile.process import BYSTANDER_THREADS, attacks, burn
from split_device.stress.hostile.scene import Scene
from split_device.stress.hostile.slices import Slices, cpu_seconds
from split_device.stress.ledger import Ledger
from split_device.stress.membership import OwnKeys, member_name
from split_device.stress.plan import StressPlan
from split_device.stress.report import report, table
from valkeys import BINARY, running_valkey
from wiretap import LATE, SPLIT, WIDTH, Setting, run_steps, step, wait_until

# --- modes -------------------------------------------------------------------------------------------------


def test_every_mode_has_a_function_and_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert attacks().keys() == MODES.keys()
    assert described().count("\n") == len(MODES) - 1
    assert main(["stress", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in MODES)


def test_modes_that_can_be_asked_for() -> None:
    assert parse_modes(None, "zmq", ["text"]) == []
    assert parse_modes("queue, kv,kv", "zmq", ["text"]) == ["queue", "kv"]
    over_zmq, over_redis = (parse_modes("all", transport, ["text"]) for transport in ("zmq", "redis"))
    assert "multipart" in set(over_zmq) - set(over_redis)
    assert "redis-memory" in set(over_redis) - set(over_zmq)
    assert "image-steps" not in over_zmq
    assert set(parse_modes("all", "zmq", ["text", "image"])) - set(over_zmq) == {"image-steps"}
    assert set(over_zmq) | set(over_redis) | {"image-steps"} == MODES.keys()


# --- what is counted, and the verdict ----------------------------------------------------------------------


def mode(**changes: Any) -> ModeOutcome:
    window = Window(0.0, 10.0, 5.0)
    facts: dict[str, Any] = {
        **{"hostile": window, "bystander": window, "honest_beside_hostile": 60.0, "honest_beside_bystander": 100.0},
        **{"lost": 0, "crashed": 0, "acts": 7, "refused": {}, "failure": None, "exceeded": None},
    }
    return ModeOutcome(**(facts | changes))


def test_throughput_is_that_of_the_slice() -> None:
    ledger = Ledger()
    ledger.decoded_by = {0: [(1.0, 100), (10.0, 20), (14.0, 30), (20.0, 1000)], 2: [(11.0, 10)]}
    window = Window(began=10.0, ended=20.0, cpu=5.0)
    assert window.throughput(ledger, [0]) == 5.0
    assert window.throughput(ledger, [0, 1, 2]) == 6.0
    assert window.cores == 0.5


def test_the_share_is_that_of_throughput_beside_a_bystander() -> None:
    assert mode().share == 0.6
    assert mode(honest_beside_hostile=0.0).share == 0.0
    # Where nothing is left beside the bystander either, the harm has lasted.
    assert mode(honest_beside_bystander=0.0).share == 0.0
    assert mode().facts()["cpu_seconds"] == 5.0


@pytest.mark.parametrize(
    ("changes", "withstood"),
    [
        ({}, True),
        ({"honest_beside_hostile": 49.0}, False),
        # A mode that did nothing proves nothing.
        ({"acts": 0}, False),
        ({"failure": "TypeError: no"}, False),
    ],
)
def test_the_worst_mode_decides(changes: dict[str, Any], withstood: bool) -> None:
    result = HostileOutcome({"a": mode(honest_beside_hostile=99.0), "b": mode(**changes)}, Peaks())
    assert result.withstood == withstood
    assert result.facts()["honest_throughput_share"] == round(result.modes["b"].share, 3)


def test_memory_is_bounded_by_what_the_docs_say() -> None:
    memory = Peaks()
    assert not memory.note("worker 0", 100 * MIB)
    assert not memory.note("worker 0", 100 * MIB + GROWTH["worker"])
    assert memory.bounded
    assert memory.note("worker 0", 101 * MIB + GROWTH["worker"])
    assert not memory.note("worker 0", 100 * MIB)
    assert not memory.bounded
    assert not HostileOutcome({"a": mode()}, memory).withstood
    assert memory.facts()["worker 0"]["peak_mib"] == 101 + GROWTH["worker"] / MIB


def test_failures_and_devices_that_got_answers_are_counted() -> None:
    ledger = Ledger()
    for device in (0, 1):
        ledger.take(device, Asked(0))
    ledger.take(0, Answered(0, equal=True, seconds=1.0, gaps=[], recoveries=[]))
    ledger.take(1, Failed(0, "Busy: full"))
    ledger.take(1, Decoded(5))
    assert (ledger.failures, ledger.devices_answered, ledger.decoded_between(0.0, LATE, [1])) == (1, 1, 5)


# --- slices ------------------------------------------------------------------------------------------------

#: Says that it is ready, and what it did when it is ended.
_MODE = """
import json, signal, threading
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
print(json.dumps({"pid": 1}), flush=True)
while not stop.wait(0.01):
    pass
print(json.dumps({"counts": {"acts": 3, "Busy": 2}, "failure": None}), flush=True)
"""


class Starts:
    """Notes what is started."""

    def __init__(self) -> None:
        self.started: list[tuple[str, float]] = []

    def mode(self, name: str) -> tuple[list[str], dict[str, str]]:
        self.started.append((name, 0.0))
        return [name], {"X": "1"}

    def bystander(self, cores: float) -> tuple[list[str], dict[str, str]]:
        self.started.append(("bystander", cores))
        return ["bystander"], {}


@pytest.fixture
def slices_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes slices of 0.3 seconds of some modes."""

    @contextlib.contextmanager
    def running(_words: list[str], _log: Path, _env: dict[str, str]) -> Iterator[Any]:
        with subprocess.Popen([sys.executable, "-c", _MODE], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            yield process, {}

    monkeypatch.setattr(slices, "running_command", running)
    monkeypatch.setattr(slices, "SETTLE", 0.0)
    # Each slice takes one second of CPU time.
    monkeypatch.setattr(slices, "cpu_seconds", lambda _pid, times=itertools.count(): float(next(times)))

    def make(*modes: str, fleet: Any = ()) -> tuple[Slices, Starts]:
        plan = StressPlan(seconds=0.6 * len(modes), hostile=modes)
        starts = Starts()
        ledger = Ledger()
        return Slices(plan, ledger, list(fleet), [], starts, tmp_path / "log"), starts

    return make


def test_each_mode_has_a_slice_and_its_bystander_burns_as_much(slices_of: Any) -> None:
    running, starts = slices_of("kv", "queue")

    def update() -> bool:
        time.sleep(0.02)
        running._ledger.take(0, Decoded(2))
        return True

    # Without devices, none is waited for, but then all have ended after the first mode.
    running._devices = [SimpleNamespace(finished=False)]
    running._ledger.take(0, Asked(0))
    running._ledger.take(0, Answered(0, equal=True, seconds=1.0, gaps=[], recoveries=[]))
    running.run(update)
    assert [name for name, _ in starts.started] == ["kv", "bystander", "queue", "bystander"]
    for name, (_, cores) in zip(("kv", "queue"), starts.started[1::2], strict=True):
        found = running.outcome.modes[name]
        assert found.hostile.seconds >= 0.3
        assert found.hostile.ended <= found.bystander.began
        assert cores == found.hostile.cores == 1.0 / found.hostile.seconds
        assert found.honest_beside_hostile > 0
        assert (found.acts, found.refused, found.failure) == (3, {"Busy": 2}, None)


def test_a_slice_ends_when_memory_exceeds_its_bound_and_the_process_is_killed(
    slices_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[str] = []
    large = SimpleNamespace(
        name="broker", process=SimpleNamespace(pid=os.getpid()), crashes=0, kill=lambda: killed.append("broker")
    )
    running, _ = slices_of("multipart", fleet=[large])
    running._seconds = LATE
    running._devices = [SimpleNamespace(finished=False)]
    running._ledger.answers[0, 0] = 1
    monkeypatch.setitem(outcome.GROWTH, "broker", -1)

    def update() -> bool:
        # Beside the bystander it has started again, and is small.
        large.process = None if killed else large.process
        running._seconds = 0.1 if killed else LATE
        time.sleep(0.02)
        return not killed

    running.run(update)
    assert killed == ["broker"]
    assert running.outcome.modes["multipart"].exceeded == "broker"
    assert not running.outcome.withstood


def test_cpu_time_includes_children() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        try:
            wait_until(lambda: cpu_seconds(process.pid) > 0.5)
        finally:
            os.killpg(process.pid, 9)
    assert cpu_seconds(process.pid) == 0.0


def burned(cores: float, seconds: float, **options: Any) -> tuple[int, float]:
    """Burns for a while. Returns the number of threads, and how long it took."""
    stop, threads = threading.Event(), []
    thread = threading.Thread(target=lambda: threads.append(burn(cores, stop, **options)))
    began = time.monotonic()
    thread.start()
    time.sleep(seconds)
    stop.set()
    thread.join()
    return threads[0], time.monotonic() - began


def test_a_bystander_burns_no_more_than_its_share() -> None:
    before = time.process_time()
    _, seconds = burned(0.2, 1.0)
    # It may exceed its share by a chunk of each thread.
    assert 0 < time.process_time() - before < 0.2 * seconds + 0.2


def test_a_bystander_that_falls_behind_takes_more_threads() -> None:
    stop, threads = threading.Event(), []
    thread = threading.Thread(target=lambda: threads.append(burn(1.0, stop, lambda: 0.0, threads=6)))
    thread.start()
    wait_until(lambda: sum(each.name == "bystander" for each in threading.enumerate()) == 6)
    stop.set()
    thread.join()
    assert threads == [6]
    assert burned(1.0, 0.5, cpu_time=lambda: 2.0 * time.monotonic())[0] == BYSTANDER_THREADS


def test_a_share_that_is_too_low_because_the_bystander_had_less_cpu_is_named() -> None:
    result = mode(bystander=Window(0.0, 10.0, 3.0), honest_beside_hostile=60.0)
    assert (result.burned, result.alike) == (0.6, False)
    assert mode(bystander=Window(0.0, 10.0, 4.6)).alike
    # What is next to nothing changes nothing.
    idle = mode(hostile=Window(0.0, 10.0, 0.3), bystander=Window(0.0, 10.0, 0.1))
    assert (idle.alike, idle.facts()["bystander_burned"]) == (True, None)
    shown = report("zmq", 0, 1.0, Ledger(), None, [], None, False, HostileOutcome({"kv": result}, Peaks()))
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table(shown))
    assert "bystander got only 60%" in captured.get()


# --- a fleet with a member for each process ----------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def target(checkpoint: Path) -> Target:
    return Target.read("text", str(checkpoint), StressPlan())


@pytest.fixture(scope="module")
def members(target: Target, tmp_path_factory: pytest.TempPathFactory) -> OwnKeys:
    roles: Any = {"worker 0": "worker", "worker 1": "worker", "device 0": "device", **HOSTILE}
    return OwnKeys(tmp_path_factory.mktemp("members"), roles, [target.manifest])


def test_each_process_has_the_keys_of_one_member(members: OwnKeys, target: Target) -> None:
    for name, role in (("worker 1", "worker"), ("device 0", "device"), ("broker", "broker"), *HOSTILE.items()):
        option, directory = members.options(name)
        assert option == "--keys"
        fleet = Fleet.open(Path(directory))
        assert fleet.identity(role).certificate.name == member_name(name)  # type: ignore[arg-type]
        assert len(list(Path(directory).glob("*.key"))) == 1
        assert fleet.manifests() == [target.manifest]
    assert (target.service.first, target.service.last, target.width) == (SPLIT.first, SPLIT.last, WIDTH)


def test_what_is_started_for_a_mode_is_a_member_of_its_role(members: OwnKeys, target: Target) -> None:
    commands = Commands(members, {"text": target}, "redis://127.0.0.1:6379", seed=3)
    words, env = commands.mode("black-hole")
    assert words[:3] == ["stress-hostile", *members.options("hostile worker")]
    assert "redis://hostile-worker@127.0.0.1:6379" in words
    assert env == members.env("hostile worker")
    assert not any(env["LAMBDA_SPLIT_REDIS_PASSWORD"] in word for word in words)
    assert commands.bystander(0.25) == (["stress-bystander", "--cores", "0.2500"], {})


# --- the modes against real queues -------------------------------------------------------------------------

#: Acts after which a mode has shown that it works.
ENOUGH = 3


def act(scene: Scene, name: str) -> None:
    """Runs a mode until it has acted for a while."""
    done = threading.Event()

    def watch() -> None:
        wait_until(lambda: scene.counts["acts"] >= ENOUGH or done.is_set())
        scene.stop.set()

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        attacks()[name](scene)
    finally:
        done.set()
        watching.join()
    assert scene.counts["acts"] >= ENOUGH


def text_modes(transport: Any) -> list[str]:
    return parse_modes("all", transport, ["text"])


def scene_of(setting: Setting, address: str, name: str) -> Scene:
    """Where the member acts that has the role of a mode."""
    role = MODES[name].role
    identity = setting.fleet.read_identity(member_name(f"hostile {role}"))
    fleet, model = setting.own_fleet(), str(setting.checkpoint)
    return Scene(address, fleet, identity, setting.service, model, WIDTH, threading.Event())


@pytest.fixture
def setting(checkpoint: Path, tmp_path: Path) -> Setting:
    """A fleet with hostile members in it."""
    made = Setting(tmp_path, checkpoint)
    for name, role in HOSTILE.items():
        made.fleet.add_member(role, member_name(name))
    return made


def test_every_mode_acts_over_zeromq(setting: Setting) -> None:
    with setting.broker() as broker, setting.worker(broker.address), setting.client(broker.address) as client:
        expected = run_steps(client, 2)
        # A worker's modes wait for devices that look for a worker.
        for name in (name for name in text_modes("zmq") if MODES[name].role == "device"):
            act(scene_of(setting, broker.address, name), name)
        assert run_steps(client, 2) == expected
        assert broker.counters["failures"] == 0


def test_every_mode_acts_over_redis(setting: Setting) -> None:
    with (
        running_valkey() as server,
        setting.worker(server.address),
        setting.client(server.address) as client,
    ):
        expected = run_steps(client, 2)
        for name in (name for name in text_modes("redis") if MODES[name].role == "device"):
            act(scene_of(setting, server.address, name), name)
        assert run_steps(client, 2) == expected
        # Without access rules it does take what the honest ones need.
        act(scene_of(setting, server.address, "redis-fleet"), "redis-fleet")


def test_a_hostile_worker_draws_devices_to_itself(setting: Setting) -> None:
    with setting.broker() as broker:
        for name in ("black-hole", "mute"):
            scene = scene_of(setting, broker.address, name)
            acting = threading.Thread(target=attacks()[name], args=(scene,))
            acting.start()
            try:
                wait_until(lambda: any(peer.service is not None for peer in broker._peers.values()))
                with setting.client(broker.address, timeout=1.0) as client:
                    # Each act is a message of the device; the first one is that it has joined.
                    opening = threading.Thread(target=fails, args=(client, scene.stop))
                    opening.start()
                    wait_until(lambda scene=scene: scene.counts["acts"] > 1)
            finally:
                scene.stop.set()
                acting.join()
                opening.join()


def fails(client: Client, stop: threading.Event) -> None:
    """Asks until the end: on a busy machine an attempt may end before any worker is there."""
    while not stop.is_set():
        with contextlib.suppress(SplitError):
            client.open_session().call([step(0)])


def test_a_curve_connection_by_hand_is_a_members(setting: Setting) -> None:
    identity = setting.fleet.read_identity("device-1")
    id_ = new_peer_id("device-1")
    announcement = headers.Announce(id_, "device", "device-1")
    with setting.broker() as broker:
        with CurveConnection(broker.address, setting.fleet, identity) as connection:
            connection.send_frame(headers.encode_header(announcement), more=True)
            assert id_ not in broker._peers
            connection.send_frame(b"", more=False)
            wait_until(lambda: id_ in broker._peers)
        setting.fleet.revoke("device-1")
        wait_until(lambda: broker._enforced == setting.fleet.roster().version)
        with pytest.raises(AuthenticationError):
            CurveConnection(broker.address, setting.fleet, identity)


def test_the_users_of_a_fleet_of_its_own_work(members: OwnKeys, tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--aclfile", str(members.acl_file()), *REDIS_LIMITS, binary=BINARY)
    with server.running():
        for name in ("worker 0", "device 0", *HOSTILE):
            password = members.env(name)["LAMBDA_SPLIT_REDIS_PASSWORD"]
            client = redis.Redis.from_url(members.address(server.address, name), password=password)
            assert client.ping()
            client.close()
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=server.port).ping()


def test_options_of_a_run_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="expected all or"):
        parse_modes(" , ", "zmq", ["text"])

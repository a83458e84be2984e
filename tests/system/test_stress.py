"""`lambda-split stress` as a user runs it: a fleet of real processes under faults.

`make test` runs a short one, `make test-long` all.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

import tiny
from fleet import running_broker, start_worker
from split_device.stress import tiny_model
from wiretap import LATE, wait_until

KEYS = {
    "requests",
    "completed",
    "tokens",
    "images",
    "steps",
    "lost",
    "duplicated",
    "mismatched",
    "worker_kills",
    "worker_stops",
    "broker_restarts",
    "replays",
    "request_ms",
    "inter_token_ms",
    "recovery_ms",
    "bytes_sent",
    "bytes_received",
    "faults",
    "memory",
    "left",
}


def start(tmp_path: Path, *arguments: object) -> subprocess.Popen[str]:
    """The command, with a temporary directory of its own, so that what it leaves can be seen."""
    command = [sys.executable, "-m", "split_common", "stress", "--json", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )


def finish(process: subprocess.Popen[str], tmp_path: Path, code: int = 0) -> Any:
    """The report. Nothing may be left of the run."""
    out, err = process.communicate(timeout=3 * LATE)
    assert process.returncode == code, err
    assert "Traceback" not in err, err
    assert out.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(each.info["cmdline"])]
    return json.loads(out)


def check_sound(report: Any) -> None:
    assert set(report) >= KEYS
    assert report["completed"] == report["requests"] > 0
    assert (report["lost"], report["duplicated"], report["mismatched"]) == (0, 0, 0), report["errors"]
    assert report["memory_within"], report["memory"]


@pytest.mark.long
@pytest.mark.parametrize("transport", ["zmq", "redis"])
def test_nothing_is_lost(transport: str, tmp_path: Path) -> None:
    # With a third worker, one may be stopped though the killed one takes long to come back. With this seed the
    # first restart of the queue is due after 10 s, as early as with any: there is time for it to be late.
    arguments = ["--transport", transport, "--devices", 2, "--workers", 3, "--seconds", 40, "--seed", 15]
    report = finish(start(tmp_path, *arguments), tmp_path)
    check_sound(report)
    assert report["worker_kills"] >= 1
    assert report["worker_stops"] >= 1
    assert report["broker_restarts"] >= 1
    assert set(report["faults"]) >= {"kill", "stop", "broker", "lag", "corruption"}
    assert report["left"] == (None if transport == "zmq" else {"entries": 0, "pending": 0})
    names = {each["process"] for each in report["memory"]}
    assert {"broker" if transport == "zmq" else "redis", "device 0", "device 1"} <= names


@pytest.mark.long
def test_no_image_is_lost(tmp_path: Path) -> None:
    arguments = ["--workload", "image", "--devices", 2, "--workers", 2, "--seconds", 30, "--seed", 7]
    report = finish(start(tmp_path, *arguments), tmp_path)
    check_sound(report)
    assert report["images"] == report["completed"]
    assert report["steps"] >= 3 * report["images"]
    assert report["tokens"] == 0
    assert report["worker_kills"] >= 1


@pytest.mark.parametrize(
    "transport", [pytest.param("zmq", marks=pytest.mark.long), pytest.param("redis", marks=pytest.mark.nightly)]
)
def test_no_turn_of_a_conversation_is_lost(transport: str, tmp_path: Path) -> None:
    arguments = ["--workload", "agents", "--transport", transport, "--devices", 1, "--workers", 2, "--seconds", 15]
    check_sound(finish(start(tmp_path, *arguments), tmp_path))


@pytest.mark.long
def test_another_models_outputs_are_mismatched(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tiny_model.build(tmp_path_factory.mktemp("other") / "model", 99)
    arguments = ["--devices", 1, "--requests", 3, "--workers", 1, "--chaos", "none", "--reference", other]
    report = finish(start(tmp_path, *arguments), tmp_path, code=1)
    assert report["mismatched"] == report["completed"] == report["requests"] == 3
    assert report["lost"] == report["duplicated"] == 0
    assert report["faults"] == {}


@pytest.mark.long
def test_it_joins_a_queue_that_runs(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = tiny.save("llama", tmp_path_factory.mktemp("model") / "model")
    with running_broker() as broker:
        worker = start_worker(checkpoint, broker.address)
        try:
            arguments = ["--broker", broker.address, "--workers", 0, "--model", checkpoint]
            report = finish(start(tmp_path, *arguments, "--devices", 1, "--requests", 4), tmp_path)
            assert worker.counters["steps"] > 0
        finally:
            worker.stop()
    check_sound(report)
    assert report["completed"] == 4
    assert report["worker_kills"] == report["broker_restarts"] == 0


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_in_order(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, "--devices", 1, "--workers", 1, "--seconds", 600, "--chaos", "stop,lag")
    try:
        children = wait_for_a_fault(process)
        assert len(children) == 3
        process.send_signal(number)
        if number == signal.SIGINT:
            # The time is over, and there is a report.
            report = finish(process, tmp_path, code=130)
            assert report["interrupted"]
            check_sound(report)
        else:
            check_terminated(process, tmp_path)
        check_gone(children)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.long
def test_it_ends_in_order_before_its_devices_are_ready(tmp_path: Path) -> None:
    process = start(tmp_path, "--devices", 2, "--workers", 1, "--seconds", 600)
    children: list[Any] = []

    def devices_start() -> bool:
        children[:] = psutil.Process(process.pid).children()
        return len(children) == 4

    try:
        wait_until(devices_start)
        process.send_signal(signal.SIGTERM)
        check_terminated(process, tmp_path)
        check_gone(children)
    finally:
        process.kill()
        process.communicate()


def check_terminated(process: subprocess.Popen[str], tmp_path: Path) -> None:
    process.communicate(timeout=LATE)
    assert process.returncode == 143
    assert not list(tmp_path.iterdir())


def check_gone(children: list[Any]) -> None:
    _, alive = psutil.wait_procs(children, timeout=LATE)
    assert not alive


def wait_for_a_fault(process: subprocess.Popen[str]) -> list[Any]:
    """Broker, worker and device, once the worker was stopped: the fleet has been at work for a while by then."""
    children: list[Any] = []

    def is_struck() -> bool:
        children[:] = psutil.Process(process.pid).children()
        return any(child.status() == psutil.STATUS_STOPPED for child in children)

    wait_until(is_struck)
    return children


@pytest.mark.long
def test_a_fleet_that_cannot_start_says_why(tmp_path: Path) -> None:
    process = start(tmp_path, "--devices", 1, "--workers", 1, "--model", tmp_path / "nothing")
    out, err = process.communicate(timeout=LATE)
    assert process.returncode == 1
    assert json.loads(out)["error"]["message"]
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize(
    ("transport", "modes"), [("zmq", ["garbage", "black-hole"]), ("redis", ["garbage", "redis-fleet"])]
)
def test_a_hostile_member_is_weighed_against_a_bystander(transport: str, modes: list[str], tmp_path: Path) -> None:
    arguments = ["--transport", transport, "--devices", 2, "--workers", 2, "--seconds", 16]
    process = start(tmp_path, *arguments, "--hostile", ",".join(modes))
    out, err = process.communicate(timeout=3 * LATE)
    assert "Traceback" not in err, err
    assert not list(tmp_path.iterdir())
    report = json.loads(out)
    assert (report["lost"], report["duplicated"], report["mismatched"]) == (0, 0, 0), report["errors"]
    assert report["faults"] == {}
    hostile = report["hostile"]
    assert list(hostile["modes"]) == modes
    for mode in hostile["modes"].values():
        assert mode["acts"] > 0
        assert mode["failure"] is None
        assert mode["seconds"] >= 4
        # The bystander burns as much, as far as the machine lets it.
        assert 0 < mode["bystander_cpu_seconds"] <= 1.5 * mode["cpu_seconds"] + 1
    assert hostile["memory_bounded"], hostile["memory"]
    assert hostile["honest_throughput_share"] == min(mode["share"] for mode in hostile["modes"].values())
    assert process.returncode == (0 if report["withstood"] else 1)

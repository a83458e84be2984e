"""The benchmarks run and report what they should; how fast anything is, no test asks."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from benchmarks.harness import Relay, prompt, report
from fleet import running_broker
from split_device.timings import STAGES

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model") / "tiny")


def run(name: str, *arguments: object) -> Any:
    """The one object on the one line that a benchmark prints."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_overhead(checkpoint: Path) -> None:
    results = run("overhead", "--model", checkpoint, "--rounds", 1)
    assert set(results) == {
        "split_tok_s",
        "unsplit_tok_s",
        "ratio",
        "bytes_per_token_up",
        "bytes_per_token_down",
        "payload_efficiency",
        "identical",
        "threads",
        "stages_ms",
    }
    assert results["identical"] is True
    assert tuple(results["stages_ms"]) == STAGES
    # 32 float32 each way, in messages that are larger than that.
    assert results["bytes_per_token_up"] > 128
    assert results["bytes_per_token_down"] > 128
    assert 0 < results["payload_efficiency"] < 1


def test_memory(checkpoint: Path) -> None:
    results = run("memory", "--model", checkpoint)
    assert set(results) == {
        "device_mib",
        "worker_mib",
        "unsplit_mib",
        "device_expected_mib",
        "worker_expected_mib",
        "empty_process_mib",
    }
    assert results["worker_expected_mib"] > 0
    assert results["empty_process_mib"] > 0


def test_the_relay_counts_what_passes() -> None:
    with running_broker() as broker:
        relay = Relay(broker.address)
        try:
            host, _, port = relay.address.removeprefix("tcp://").rpartition(":")
            with socket.create_connection((host, int(port))) as client:
                client.settimeout(10)
                # The greeting of ZMTP 3 (ZeroMQ RFC 23) has 64 bytes; the other side answers with its own.
                client.sendall(b"\xff" + bytes(8) + b"\x7f\x03" + bytes(53))
                greeting = b""
                while len(greeting) < 64:
                    greeting += client.recv(64)
            assert relay.up == 64
            assert relay.down >= len(greeting)
        finally:
            relay.close()


def test_prompts_fit_the_vocabulary() -> None:
    for vocabulary in (2, 97, 50_000):
        ids = prompt(vocabulary, 64)
        assert ids.shape == (1, 64)
        assert int(ids.max()) < vocabulary
        assert torch.equal(ids, prompt(vocabulary, 64))
    assert int(prompt(50_000, 64).min()) >= 100


def test_reports(capsys: pytest.CaptureFixture[str]) -> None:
    report({"ratio": 0.5, "identical": True}, as_json=True, title="t")
    assert json.loads(capsys.readouterr().out) == {"ratio": 0.5, "identical": True}
    report({"ratio": 0.5, "identical": True}, as_json=False, title="t")
    shown = capsys.readouterr().out
    assert "0.500" in shown
    assert "True" in shown

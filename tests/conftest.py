"""What all tests share: directories of their own, the small real model, no process left behind."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, settings

# Nothing is written where the tests happen to be started.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(__file__).parent.parent / ".hypothesis"))

# Before torch and transformers are imported: one thread for each test process, and no hub.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import fleet
from split_broker import broker
from split_common.cli import main
from split_common.errors import ModelError
from split_common.models.demo_model import ensure_demo_model
from split_common.system.process import collect_seldom
from split_common.transport.redis import lease
from split_device.generation.compilers import COMPILERS
from zygote import Zygote

# Signals may be ignored or blocked where the tests are started (in a job in the background, by cron), and then they
# are in every process that a test starts. Not SIGHUP, which no test sends and `nohup` wants ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())

collect_seldom()

#: What commands are forked from, where a test starts them as processes.
ZYGOTE = Zygote()
ZYGOTE.install()

# An example may take as long as a busy machine needs.
settings.register_profile("patient", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

#: `make test-clients` runs them, in an environment of its own.
collect_ignore = ["clients"]

#: The user's own cache, if one is set: the small real model is fetched once, not once in every run.
USER_CACHE = os.environ.get("LAMBDA_SPLIT_CACHE")

#: Seconds that a child process may take to go away after the last test.
CHILD_GRACE = 300.0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:.*past_key_values.*:FutureWarning")


def pytest_collection_finish() -> None:
    """Leaves out of collections what is imported by now, as a command does: it is millions of objects."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(scope="session", autouse=True)
def _no_process_left() -> Iterator[None]:
    """Fail when a process that a test started outlives the last test."""
    yield
    COMPILERS.close()
    ZYGOTE.end()
    children = [
        child for child in psutil.Process().children(recursive=True) if "resource_tracker" not in _command(child)
    ]
    _, left = psutil.wait_procs(children, timeout=CHILD_GRACE)
    commands = [_command(child) for child in left]
    for child in left:
        child.kill()
    if commands:
        pytest.fail("processes were left running:\n" + "\n".join(commands))


def _command(process: psutil.Process) -> str:
    try:
        return f"{process.pid}: {' '.join(process.cmdline())}"
    except psutil.Error:
        return f"{process.pid}: gone"


@pytest.fixture(scope="session", autouse=True)
def _own_directories() -> Iterator[None]:
    """Keep the tests away from the user's keys, cache and sockets."""
    # Not pytest's own directory: with it, a socket's path could be longer than the system allows.
    with tempfile.TemporaryDirectory(prefix="split-") as base, pytest.MonkeyPatch.context() as patch:
        for name in ("CONFIG", "CACHE", "STATE", "RUNTIME"):
            directory = Path(base) / name.lower()
            directory.mkdir(mode=0o700)
            patch.setenv(f"LAMBDA_SPLIT_{name}", str(directory))
        yield


@pytest.fixture(autouse=True)
def _sigterm_as_before() -> Iterator[None]:
    """A command that ran in this process leaves no handler: SIGTERM would not end the processes that tests fork."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module", params=fleet.TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the tests that use it over each transport."""
    with fleet.using(request.param):
        yield request.param


@pytest.fixture(scope="module", autouse=True)
def patient_queue() -> Iterator[None]:
    """No peer is taken for dead by its silence: on a busy machine a heartbeat may be late.

    Tests of that silence set the limits themselves.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(broker, "MISSED", 600)
        patch.setattr(lease, "LEASE", 600.0)
        yield


@pytest.fixture(scope="session")
def smollm2(_own_directories: None) -> Path:
    """The checkpoint of SmolLM2-135M-Instruct, kept in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        if USER_CACHE is None:
            patch.delenv("LAMBDA_SPLIT_CACHE")
        else:
            patch.setenv("LAMBDA_SPLIT_CACHE", USER_CACHE)
        try:
            return ensure_demo_model(progress=False)
        except ModelError as exc:
            pytest.skip(str(exc))


@dataclass
class Done:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def notes(self) -> str:
        """What is on stderr, without the first line if it says what is being loaded."""
        return re.sub(r"^(loading|reading) .* …\n", "", self.err)

    @property
    def json(self) -> Any:
        """The one object on the one line of stdout."""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command in this process, where torch is imported already."""

    def run(*arguments: object, stdin: str | io.StringIO | None = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        # Whatever goes wrong, no test fetches a model. `doctor` looks only at one that is named.
        if "doctor" not in arguments:
            monkeypatch.setenv("LAMBDA_SPLIT_MODEL", "/no/default/model")
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Done(code, captured.out, captured.err)

    return run

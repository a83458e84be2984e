"""Batches that the agent answers, and what `jobs` shows of batches."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fleet import running_broker, start_worker
from serving import Unsplit
from split_common.system.lock import holding
from split_device.batches.place import Place, Record, batches_dir, find_batch, place_of
from split_device.jobs import waits
from split_device.jobs.agent import log_path, running_agent
from split_device.jobs.job import Message, ModelChoice, Task
from split_device.jobs.store import Store
from wiretap import wait_until

#: Seconds that something in another process may take on a busy machine.
PATIENCE = 300.0

pytestmark = pytest.mark.usefixtures("state")

LINES = 16
TOKENS = 150


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    with running_broker() as broker:
        worker = start_worker(checkpoint, broker.address)
        yield broker.address
        worker.stop()


@pytest.fixture
def asked(checkpoint: Path, address: str, tmp_path: Path) -> tuple[Any, ...]:
    """A batch of some lines, to be answered into `out.jsonl`."""
    source = tmp_path / "in.txt"
    source.write_text("".join(f"Say {index}\n" for index in range(LINES)))
    options = ("--model", checkpoint, "--broker", address, "--max-tokens", TOKENS)
    return ("batch", source, "-o", tmp_path / "out.jsonl", *options)


def generated(place: Place) -> int:
    with Store(place.store) as store:
        return store.generated()


def answers(path: Path) -> list[str | None]:
    return [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.long
def test_an_agent_that_is_killed_goes_on(
    run: Any, asked: tuple[Any, ...], checkpoint: Path, tmp_path: Path
) -> None:
    handed = run(*asked, "--detach", "--json")
    name, pid = handed.json["name"], handed.json["agent"]
    assert (handed.code, handed.json["detached"], handed.json["lines"]) == (0, True, LINES)
    assert f"started agent {pid}" in handed.err
    place, _ = find_batch(name)
    wait_until(lambda: generated(place) > LINES, PATIENCE)
    # What was said of workers is forgotten when lines make progress.
    waits.say("the worker is gone")
    wait_until(lambda: waits.said() == "", PATIENCE)
    (listed,) = run("jobs", "list", "--json").json["batches"]
    assert (listed["name"], listed["state"], listed["answers"]) == (name, "running", LINES)
    assert re.search(rf"{name} +running +\d+ of {LINES} +in.txt +out.jsonl", run("jobs", "list").out)
    taken = run(*asked)
    assert (taken.code, "the agent is already working on" in taken.err) == (1, True)

    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: running_agent() is None, PATIENCE)
    kept = generated(place)
    assert "interrupted" in run("agent", "status").out
    assert run("jobs", "watch", name).err.endswith(
        "is interrupted, and no agent is running: `lambda-split agent start` starts one\n"
    )

    assert run("agent", "start", *asked[6:8]).code == 0
    watched = run("jobs", "watch", name, "--json")
    assert (watched.code, watched.json["state"], watched.json["done"]) == (0, "ended", LINES)
    assert running_agent() is not None
    # It is written before it is forgotten.
    wait_until(lambda: not place.store.exists() and not place.lock.exists(), PATIENCE)
    unsplit = Unsplit(checkpoint)
    assert answers(tmp_path / "out.jsonl") == [
        unsplit.say(f"user:Say {index}</s>assistant:", TOKENS) for index in range(LINES)
    ]
    assert kept > 0
    # Prompts and answers are gone from the state, and the log never had any.
    assert {path.suffix for path in batches_dir().iterdir()} == {".json", ".done"}
    assert "Say" not in log_path().read_text()
    assert "its answers are in" in run("jobs", "result", name).err
    assert (run(*asked, "--detach").code, run("jobs", "prune", "--older-than", "0s").code) == (0, 0)
    assert list(batches_dir().iterdir()) == []


@pytest.mark.long
def test_a_batch_is_cancelled_and_goes_on_in_the_foreground(
    run: Any, asked: tuple[Any, ...], checkpoint: Path, address: str, tmp_path: Path
) -> None:
    started = run("agent", "start", "--broker", address, "--json").json["pid"]
    handed = run(*asked, "--detach", "--max-jobs", 8)
    name = handed.out.strip()
    assert f"agent {started} answers it" in handed.err
    assert "an agent is already running with its own options; ignored: --broker, --max-jobs\n" in handed.err
    place, _ = find_batch(name)
    wait_until(lambda: generated(place) > LINES, PATIENCE)
    done = run("jobs", "cancel", name)
    assert (done.code, f"{name} is cancelled; its file gets the answers so far" in done.err) == (0, True)
    ended = run("jobs", "watch", name, "--json")
    assert (ended.code, ended.json["state"]) == (1, "ended")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == LINES
    assert running_agent() == started
    assert run("jobs", "cancel", name).err == f"error: {name} has ended already\n"

    again = run(*asked, "--json")
    assert (again.code, again.json["errors"]) == (0, 0)
    unsplit = Unsplit(checkpoint)
    assert answers(tmp_path / "out.jsonl")[3] == unsplit.say("user:Say 3</s>assistant:", TOKENS)
    assert run("jobs", "list", "--json").json["batches"] == []


def test_answers_of_a_batch_that_is_not_done(run: Any, asked: tuple[Any, ...], tmp_path: Path) -> None:
    """They can be read, also of one that nobody works on, and cancelling it writes them."""
    assert run(*asked, "--detach").code == 0
    run("agent", "stop")
    said = log_path().read_text().splitlines()
    assert said.count("stopping: what runs is interrupted, and goes on when an agent runs again") == 1
    place = place_of(tmp_path / "out.jsonl")
    with Store(place.store) as store:
        store.recover()
        done = sum(job.state == "succeeded" for job in store.jobs())
    found = run("jobs", "result", place.name)
    assert (found.code, len(found.out.splitlines())) == (0, done)
    assert run("jobs", "result", place.name, "-o", tmp_path / "some.txt").code == 0
    assert len((tmp_path / "some.txt").read_text().splitlines()) == done
    assert len(run("jobs", "result", place.name, "--json").json["results"]) == done
    shown = run("jobs", "show", place.name, "--json").json
    assert (shown["state"], shown["done"], shown["detached"]) == ("interrupted", done, True)

    assert run("jobs", "cancel", place.name).code == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["error"] and record["error"]["code"] for record in records].count("cancelled") == LINES - done
    record = place.record()
    assert isinstance(record, Record)
    assert record.errors == LINES - done
    assert not place.lock.exists()
    assert run("jobs", "show", "batch-none").code == 1


def test_a_batch_is_watched(run: Any, state: Path, tmp_path: Path) -> None:
    """This process holds the batch's lock, and ends the batch."""
    place = place_of(tmp_path / "out.txt")
    with Store(place.store) as store:
        task = Task(model=ModelChoice(name="m"), prompt=(Message("user", "Hello"),))
        store.submit_all([(task, 0, None)] * 2)
    kinds: dict[str, Any] = {"input_form": "text", "output_form": "txt", "detached": True}
    record = Record(
        source="in.txt", output=str(tmp_path / "out.txt"), lines=2, jobs=2, created=time.time(), **kinds
    )
    place.write(record)
    command = [sys.executable, "-m", "split_common", "jobs", "watch", place.name]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stderr is not None
        with holding(place.lock, remove=True):
            assert watching.stderr.readline() == f"{place.name}: 0 of 2\n"
            waits.say("the worker is gone")
            assert watching.stderr.readline() == "the worker is gone\n"
            place.write(msgspec.structs.replace(record, finished=time.time()))
        assert watching.communicate(timeout=PATIENCE)[1] == f"{record.output}: 2 answered\n"
    assert watching.returncode == 0
    waits.over()
    place.write(msgspec.structs.replace(record, finished=time.time(), errors=1))
    silent = run("jobs", "watch", place.name, "--progress", "none")
    assert (silent.code, silent.err) == (1, f"{record.output}: 1 answered, 1 failed\n")

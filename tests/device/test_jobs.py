"""Jobs as a user has them: submitted, run by an agent that may be killed, and come back for."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fleet import serving_here
from split_common.system.lock import holding
from split_device import Device
from split_device.jobs import waits
from split_device.jobs.agent import MAX_LOG, lock_path, log_path, running_agent, trim_log
from split_device.jobs.follow import follow
from split_device.jobs.hooks import command_action
from split_device.jobs.job import ModelChoice, Task, Update
from split_device.jobs.store import Store, store_path
from wiretap import wait_until

#: Seconds that something in another process may take on a busy machine.
PATIENCE = 300.0

pytestmark = pytest.mark.usefixtures("state")


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    """A broker and a worker of the tiny model."""
    with serving_here(checkpoint) as running:
        yield running


def unsplit(checkpoint: Path, prompt: str, tokens: int, **options: Any) -> str:
    """What the unsplit model says, until its end token or the tokenizer's."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ends = {model.generation_config.eos_token_id, tokenizer.eos_token_id}
    ids = tokenizer(f"user:{prompt}</s>assistant:", return_tensors="pt")["input_ids"]
    chosen = {"do_sample": False, "eos_token_id": sorted(ends - {None}), **options}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **chosen)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def tokens_of(id_: str) -> int:
    with Store(store_path()) as store:
        return store.get(id_).tokens


def test_from_submission_to_the_answer(run: Any, checkpoint: Path, address: str, state: Path) -> None:
    model = ("--model", checkpoint)
    early = run("submit", "Hello", *model, "--max-tokens", 8, "--key", "one")
    assert early.code == 0
    assert "no agent is running" in early.err
    id_ = early.out.strip()
    assert run("agent", "status").code == 1
    assert run("submit", "Hi", *model, "--wait").code == 1
    refused = run("jobs", "result", id_)
    assert (refused.code, refused.err) == (1, f"error: {id_} is queued\n")

    agent = run("agent", "start", "--broker", address, "--json").json
    assert agent["pid"] == running_agent()
    # An address may hold a password, and arguments are everybody's to read.
    assert not any(address in word for word in psutil.Process(agent["pid"]).cmdline())
    assert agent["jobs"]["queued"] == 1
    assert agent["started"]
    again = run("agent", "start", "--broker", address)
    assert (again.code, f"already running (process {agent['pid']})" in again.err) == (0, True)
    once_more = run("agent", "start", "--broker", address, "--json").json
    assert (once_more["pid"], once_more["started"]) == (agent["pid"], False)
    assert run("agent", "run", "--broker", address).code == 1

    expected = unsplit(checkpoint, "Hello", 8)
    assert run("jobs", "watch", id_).out == expected + "\n"
    found = run("jobs", "result", id_, "--json").json
    assert (found["text"], found["state"], found["tokens"], found["finish_reason"]) == (
        expected,
        "succeeded",
        8,
        "length",
    )
    assert run("submit", "Hello", *model, "--max-tokens", 8, "--key", "one").out.strip() == id_

    torch.manual_seed(5)
    sampled = unsplit(checkpoint, "Hello", 8, do_sample=True, temperature=1.5, top_p=0.9, top_k=0)
    options = ("--max-tokens", 8, "--temperature", 1.5, "--top-p", 0.9, "--seed", 5)
    assert run("submit", "--file", "-", *model, *options, "--wait", stdin="Hello").out == sampled + "\n"

    named = run("submit", "Hello", *model, "--max-tokens", 8, "--request-id", "mine", "--json")
    assert named.json["request_id"] == "mine"
    assert run("jobs", "watch", named.json["id"]).out == expected + "\n"
    assert "request mine, session " in log_path().read_text()

    stop = expected[4:6]
    shorter = run("submit", "Hello", *model, "--max-tokens", 8, "--stop", stop, "--wait", "--json").json
    assert (shorter["text"], shorter["finish_reason"]) == (expected[: expected.index(stop)], "stop")

    failed = run("submit", "x" * 300, *model, "--wait")
    assert failed.code == 1
    assert re.search("failed: .* leave no room", failed.err)

    listed = run("jobs", "list", "--json").json["jobs"]
    assert [job["state"] for job in listed] == ["failed", *["succeeded"] * 4]
    assert "Hello" not in log_path().read_text()
    assert run("jobs", "prune", "--older-than", "0s", "--json").json == {"removed": 5, "batches": 0}
    assert run("agent", "stop", "--json").json == {"stopped": agent["pid"]}
    assert run("agent", "stop", "--json").json == {"stopped": None}
    assert f"agent {agent['pid']} runs" in run("agent", "logs").out


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_killed_agent_goes_on_where_it_was(run: Any, checkpoint: Path, address: str, kills: int) -> None:
    options = ("--model", checkpoint, "--max-tokens", 200)
    greedy = run("submit", "Hello", *options).out.strip()
    sampled = run("submit", "Hello", *options, "--temperature", 1.0, "--seed", 7).out.strip()
    seen = 0
    for _ in range(kills):
        pid = run("agent", "start", "--broker", address, "--json").json["pid"]
        # All of them, if this process was so late that it is done.
        goal = min(seen + 20, 400)
        wait_until(lambda enough=goal: tokens_of(greedy) + tokens_of(sampled) >= enough, PATIENCE)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: running_agent() is None, PATIENCE)
        kept = tokens_of(greedy) + tokens_of(sampled)
        assert kept >= goal
        seen = kept
    run("agent", "start", "--broker", address)
    assert run("jobs", "watch", greedy).out == unsplit(checkpoint, "Hello", 200) + "\n"
    torch.manual_seed(7)
    expected = unsplit(checkpoint, "Hello", 200, do_sample=True, temperature=1.0, top_k=0)
    assert run("jobs", "watch", sampled).out == expected + "\n"


def test_jobs_wait_for_a_worker_and_can_be_cancelled(
    run: Any, checkpoint: Path, address: str, tmp_path: Path
) -> None:
    """Nobody serves this cut: the job waits, and fails when there was time enough."""
    options = ("--model", checkpoint, "--layers", "1:-1")
    waiting = run("submit", "Hello", *options).out.strip()
    run("agent", "start", "--broker", address, "--give-up", 4)
    wait_until(lambda: "waiting: no worker" in log_path().read_text(), PATIENCE)
    wait_until(lambda: waits.said().startswith("waiting: no worker"), PATIENCE)
    for _ in range(5):
        cancelled = run("submit", "Hello", "--model", checkpoint, "--max-tokens", 200).out.strip()
        wait_until(lambda id_=cancelled: tokens_of(id_) > 0, PATIENCE)
        assert waits.said() == ""
        # On a busy machine it may be through by now.
        if run("jobs", "cancel", cancelled).code == 0:
            break
    failed = run("jobs", "watch", cancelled)
    assert (failed.code, "was cancelled" in failed.err) == (1, True)
    before = tokens_of(cancelled)
    assert 0 < before < 200
    assert "failed: no worker" in run("jobs", "watch", waiting).err

    run("jobs", "retry", cancelled)
    assert run("jobs", "watch", cancelled).out == unsplit(checkpoint, "Hello", 200) + "\n"


def test_who_watches_a_job_is_told_what_it_waits_for(checkpoint: Path) -> None:
    said: list[str] = []
    with Store(store_path()) as store, holding(lock_path()):
        job = store.submit(Task(model=ModelChoice(name=str(checkpoint)), prompt="Hello"))
        waits.say("worker a is gone: waiting 60 s for another one")

        def hear(text: str) -> None:
            said.append(text)
            if len(said) == 1:
                waits.say("worker b has taken over")
            else:
                store.write([Update(id=job.id, state="failed", error="enough")])

        assert follow(store, job.id, on_notice=hear).state == "failed"
    assert said == ["worker a is gone: waiting 60 s for another one", "worker b has taken over"]
    waits.over()
    assert waits.said() == ""


def test_an_agent_that_waits_for_a_broker_can_be_stopped(run: Any, checkpoint: Path) -> None:
    id_ = run("submit", "Hello", "--model", checkpoint).out.strip()
    run("agent", "start", "--broker", "tcp://127.0.0.1:9", "--timeout", PATIENCE)
    wait_until(lambda: run("jobs", "show", id_, "--json").json["state"] == "running", PATIENCE)
    assert run("agent", "stop", "--timeout", PATIENCE / 4).code == 0
    assert run("jobs", "show", id_, "--json").json["state"] == "queued"


def test_the_log_of_an_agent_does_not_grow_without_bound(run: Any, address: str) -> None:
    log_path().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    log_path().write_text("an old line\n" * (MAX_LOG // 10))
    run("agent", "start", "--broker", address)
    old = log_path().with_name("agent.log.1")
    assert old.stat().st_size > MAX_LOG
    assert old.stat().st_mode & 0o777 == 0o600
    assert "an old line" not in run("agent", "logs").out
    # What the agent writes after its log was moved away goes to the file's new beginning.
    log_path().write_text("x" * (MAX_LOG + 1))
    trim_log()
    run("agent", "stop")
    assert log_path().stat().st_size < 10_000


def test_an_agent_that_keeps_nothing(run: Any, address: str, tmp_path: Path) -> None:
    """It does what was to be done at the end of a job before it removes the job."""
    done = tmp_path / "done"
    with Store(store_path()) as store:
        gone = store.cancel(store.submit(Task(model=ModelChoice(name="any"), prompt="x")).id).id
        store.hooks.add([command_action(f"touch '{done}'")], [gone])
    run("agent", "start", "--broker", address, "--keep", "0s")
    wait_until(lambda: run("jobs", "show", gone).code == 1, PATIENCE)
    wait_until(done.exists, PATIENCE)
    assert run("agent", "start", "--keep", "long").code == 2


def test_from_python(run: Any, checkpoint: Path, address: str, tmp_path: Path) -> None:
    key = tmp_path / "store.key"
    device = Device(checkpoint, store_key=key)
    run("agent", "start", "--broker", address, "--store-key", key)

    async def both() -> list[str]:
        return await asyncio.gather(
            device.submit("Hello", max_tokens=8), device.submit([{"role": "user", "content": "Bye"}], max_tokens=8)
        )

    assert asyncio.run(both()) == [unsplit(checkpoint, text, 8) for text in ("Hello", "Bye")]
    assert run("jobs", "list").code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("submit",), "give either a prompt, --file or --each-line"),
        (("submit", "a", "--file", "-"), "give either a prompt, --file or --each-line"),
        (("submit", "a", "--each-line", "-"), "goes with neither a prompt nor --file, --wait or --request-id"),
        (("submit", "a", "--column", "b"), "--column needs --each-line"),
        (("submit", "--each-line", "/no/such/file"), "cannot be read"),
        (("submit", " "), "the prompt is empty"),
        (("submit", "a", "--model", "any", "--key", ""), "the key is empty: leave it out, or give one"),
        (("submit", "--file", "/no/such/file"), "cannot be read"),
        (("jobs", "show", "job-none"), "no job has the id job-none"),
        (("jobs", "list", "--state", "lost"), "invalid state 'lost'"),
        (("jobs", "prune", "--older-than", "soon"), "invalid age 'soon'"),
        (("agent", "logs"), "there is no log"),
    ],
)
def test_wrong_usage_is_one_line(run: Any, arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.code in (1, 2)
    assert message in done.err
    assert done.err.count("\n") == 1

"""Files of requests: what is answered, what is refused, and what survives being killed."""

from __future__ import annotations

import contextlib
import json
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from benchmarks import batch_faults
from fleet import running_broker, start_worker
from serving import Unsplit
from split_common.cli import main
from split_device.jobs.store import Store
from split_device.openai.batch_file import work_path

#: Seconds that something in another process may take on a busy machine.
PATIENCE = 300.0

LINES = 40
TOKENS = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tokenizer(tiny.save("llama", tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running_broker() as broker:
        yield broker.address


@pytest.fixture(scope="module")
def worker(checkpoint: Path, address: str) -> Iterator[None]:
    running = start_worker(checkpoint, address)
    yield
    running.stop()


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def chat(custom_id: str, text: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    fields = {"model": "gpt-4o-mini", "messages": messages, "max_tokens": 8, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": fields}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_and_bad_lines(run: Any, checkpoint: Path, address: str, worker: None, tmp_path: Path) -> None:
    text = {"model": "x", "prompt": "Once", "max_tokens": 8, "n": 2, "seed": 3, "top_p": 0.9}
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    source = write(
        tmp_path / "in.jsonl",
        chat("parts", "", messages=[{"role": "user", "content": parts}]),
        {"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": text},
        "",
        "no JSON",
        "[1]",
        chat("parts", "again"),
        {**chat("url", "x"), "url": "/v1/embeddings"},
        {**chat("method", "x"), "method": "GET"},
        chat("tools", "x", tools=[{"type": "function"}]),
        chat("typed", "x", max_tokens="many"),
        chat("unknown", "x", colour="red"),
        chat("stream", "x", stream=True),
        chat("long", "x" * 300),
        {"method": "POST"},
    )
    output = tmp_path / "out.jsonl"
    options = ("--model", checkpoint, "--broker", address)
    done = run("batch", source, "-o", output, *options, "--json")
    assert done.code == 1
    facts = done.json
    assert (facts["lines"], facts["errors"], facts["tokens"]) == (13, 11, 24)
    records = read(output)
    unsplit = Unsplit(checkpoint)

    body = records[0]["response"]["body"]
    assert records[0]["error"] is None
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == unsplit.say("user:Hello</s>assistant:", 8)
    assert body["usage"] == {"prompt_tokens": 21, "completion_tokens": 8, "total_tokens": 29}
    assert [choice["text"] for choice in records[1]["response"]["body"]["choices"]] == [
        unsplit.say("Once", 8, seed, top_p=0.9) for seed in (3, 4)
    ]
    assert all(record["response"] is None for record in records[2:])
    assert [(record["custom_id"], record["error"]["code"]) for record in records[2:]] == [
        (None, "invalid_request"),
        (None, "invalid_request"),
        ("parts", "invalid_request"),
        ("url", "invalid_request"),
        ("method", "invalid_request"),
        ("tools", "unsupported_parameter"),
        ("typed", "invalid_request_error"),
        ("unknown", "invalid_request_error"),
        ("stream", "invalid_request"),
        ("long", "PromptTooLong"),
        (None, "invalid_request"),
    ]
    assert not work_path(output).exists()

    again = run("batch", source, "-o", output, *options)
    assert (again.code, "exists already" in again.err) == (2, True)


def test_answers_go_where_they_can_be_written(
    checkpoint: Path, address: str, worker: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", str(checkpoint), "--broker", address)
    source = write(tmp_path / "in.jsonl", chat("a", "Hello"))
    (tmp_path / "link").symlink_to(source)
    for output, message in ((tmp_path / "link", "link is the input"), (tmp_path / "none" / "x", "not a directory")):
        assert main(["batch", str(source), "-o", str(output), "--overwrite", *options]) == 2
        assert message in capfd.readouterr().err
    assert json.loads(source.read_text())["custom_id"] == "a"

    assert main(["batch", str(source), "-o", "/dev/stdout", *options]) == 0
    assert json.loads(capfd.readouterr().out)["custom_id"] == "a"
    assert main(["batch", str(source), "-o", "/dev/null", *options]) == 0
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.parametrize("kills", [(1, 1), pytest.param((2, 3), marks=pytest.mark.long)])
def test_a_batch_that_is_killed_again_and_again(
    checkpoint: Path, address: str, tmp_path: Path, kills: tuple[int, int]
) -> None:
    """Every line is answered once, by the tokens of the unsplit model, whoever dies meanwhile."""
    lines = batch_faults.requests(LINES, TOKENS)
    source = write(tmp_path / "in.jsonl", *lines)
    output = tmp_path / "out.jsonl"
    options = ["--model", str(checkpoint), "--broker", address]
    batch = batch_faults.Batch(source, [*options, "--max-jobs", "8"])
    with batch_faults.Workers(options) as workers:
        facts = batch.disturbed(output, workers, batch_kills=kills[0], worker_kills=kills[1])
    assert (facts["batch_kills"], facts["worker_kills"]) == kills
    # It did not begin anew.
    assert facts["added"] <= LINES * TOKENS - facts["kept"] < LINES * TOKENS
    unsplit = Unsplit(checkpoint)
    for line, record in zip(lines, read(output), strict=True):
        assert record["custom_id"] == line["custom_id"]
        answer = record["response"]["body"]["choices"][0]["message"]["content"]
        prompt, seed = line["body"]["messages"][0]["content"], line["body"].get("seed")
        assert answer == unsplit.say(f"user:{prompt}</s>assistant:", TOKENS, seed, top_p=0.9)


def test_ctrl_c_and_another_file(run: Any, checkpoint: Path, address: str, worker: None, tmp_path: Path) -> None:
    asked = [chat(str(index), f"Say {index}", max_tokens=200) for index in range(16)]
    source = write(tmp_path / "in.jsonl", *asked)
    output = tmp_path / "out.jsonl"
    options = ("--model", str(checkpoint), "--broker", address)
    with process("batch", source, "-o", output, *options) as batch:
        wait_for_tokens(output, 80, batch)
        taken = run("batch", source, "-o", output, *options)
        assert (taken.code, f"process {batch.pid} is already working on" in taken.err) == (1, True)
        batch.send_signal(signal.SIGINT)
        assert batch.wait(PATIENCE) == 130
    with Store(work_path(output)) as store:
        assert store.count()["running"] == 0
        kept = store.generated()
    assert kept >= 80

    # What both files ask for is not generated again; what only the first one did is not answered.
    write(source, chat("new", "Hello"), chat("0", "Say 0", max_tokens=200))
    done = run("batch", source, "-o", output, *options, "--json")
    assert done.code == 0
    assert done.json["tokens"] < 208
    unsplit = Unsplit(checkpoint)
    answers = {record["custom_id"]: record["response"]["body"]["choices"][0] for record in read(output)}
    assert {name: answer["message"]["content"] for name, answer in answers.items()} == {
        "new": unsplit.say("user:Hello</s>assistant:", 8),
        "0": unsplit.say("user:Say 0</s>assistant:", 200),
    }


@contextlib.contextmanager
def process(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "split_common", *map(str, arguments)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def wait_for_tokens(output: Path, goal: int, batch: subprocess.Popen[str]) -> None:
    """Until a batch has so many tokens in its store."""
    deadline = time.monotonic() + PATIENCE
    while True:
        assert time.monotonic() < deadline, "the batch makes no progress"
        assert batch.poll() is None, "the batch has ended too early"
        if work_path(output).exists():
            with contextlib.suppress(Exception), Store(work_path(output)) as store:
                if store.generated() >= goal:
                    return
        time.sleep(0.02)

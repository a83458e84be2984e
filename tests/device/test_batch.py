"""Files of requests: what is answered, what is refused, and what survives being killed."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from benchmarks import batch_faults
from commands import process
from fleet import running_broker, start_worker
from serving import Unsplit
from split_common.cli import main
from split_common.errors import ConfigError
from split_common.system.console import stderr
from split_device.batches import finish
from split_device.batches.place import Record, batches_dir, place_of, places
from split_device.cli import batch as batch_command
from split_device.cli import batch_run
from split_device.cli.batch_progress import Lines
from split_device.cli.batch_run import Work
from split_device.jobs.store import Store

#: Seconds that something in another process may take on a busy machine.
PATIENCE = 300.0

LINES = 40
TOKENS = 24


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


def test_several_prompts_and_token_ids(
    run: Any, checkpoint: Path, address: str, worker: None, tmp_path: Path
) -> None:
    unsplit = Unsplit(checkpoint)
    ids = unsplit.tokenizer("Once")["input_ids"]
    bodies: list[dict[str, Any]] = [
        {"model": "x", "prompt": ["Once", "Twice"], "n": 2, "max_tokens": 4},
        {"model": "x", "prompt": ids, "max_tokens": 4},
        {
            "model": "x",
            "prompt": [ids, "Twice"],
            "max_tokens": 4,
            "echo": True,
            "logprobs": 1,
            "prompt_logprobs": 2,
        },
        {"model": "x", "prompt": ["Once", "Twice"], "best_of": 3, "max_tokens": 4, "temperature": 1, "seed": 3},
    ]
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good"}]
    source = write(
        tmp_path / "in.jsonl",
        *({"custom_id": str(index), "url": "/v1/completions", "body": body} for index, body in enumerate(bodies)),
        chat("begun", "", messages=said, continue_final_message=True, max_tokens=4),
    )
    output = tmp_path / "out.jsonl"
    assert run("batch", source, "-o", output, "--model", checkpoint, "--broker", address).code == 0
    several, tokens, repeated, best, begun = [record["response"]["body"] for record in read(output)]
    expected = [unsplit.say(prompt, 4) for prompt in ("Once", "Once", "Twice", "Twice")]
    assert [(choice["index"], choice["text"]) for choice in several["choices"]] == [*enumerate(expected)]
    twice = unsplit.tokenizer("Twice")["input_ids"]
    assert several["usage"]["prompt_tokens"] == len(ids) + len(twice)
    assert tokens["choices"][0]["text"] == expected[0]
    assert [choice["text"] for choice in repeated["choices"]] == [f"Once{expected[0]}", f"Twice{expected[2]}"]
    for choice, own in zip(repeated["choices"], (ids, twice), strict=True):
        scores = torch.log_softmax(unsplit.model(torch.tensor([own])).logits[0], -1)
        known = [float(scores[place, token]) for place, token in enumerate(own[1:])]
        assert choice["logprobs"]["token_logprobs"][1 : len(own)] == pytest.approx(known, abs=1e-4)
        assert len(choice["logprobs"]["tokens"]) == len(own) + 4
        assert {len(top) for top in choice["logprobs"]["top_logprobs"][1:]} == {1}
        told = [
            each[str(token)]["logprob"] for each, token in zip(choice["prompt_logprobs"][1:], own[1:], strict=True)
        ]
        assert told == pytest.approx(known, abs=1e-4)
    drawn = [[unsplit.say(prompt, 4, seed) for seed in (3, 4, 5)] for prompt in ("Once", "Twice")]
    assert all(choice["text"] in own for choice, own in zip(best["choices"], drawn, strict=True))
    assert {choice["logprobs"] for choice in best["choices"]} == {None}
    assert best["usage"]["completion_tokens"] == 24
    assert begun["choices"][0]["message"]["content"] == unsplit.say("user:Hello</s>assistant:Good", 4)


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
        chat("functions", "x", functions=[{"name": "f"}]),
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
        ("functions", "unsupported_parameter"),
        ("typed", "invalid_request_error"),
        ("unknown", "invalid_request_error"),
        ("stream", "invalid_request"),
        ("long", "PromptTooLong"),
        (None, "invalid_request"),
    ]
    assert len({record["id"] for record in records}) == 13
    assert facts["reasons"]["invalid_request"] == 7
    assert sum(facts["reasons"].values()) == 11
    assert facts["first_error"].startswith("line 4: the line is not JSON")
    assert "2 answered, 11 failed (7 invalid request, " in done.err
    assert "the first: line 4: the line is not JSON" in done.err
    assert "to retry what failed, run the same command again" in done.err


def test_a_rerun_asks_again_what_failed(
    run: Any, checkpoint: Path, address: str, worker: None, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("Hello\n" + "x" * 300 + "\nBye\n")
    asked = ("batch", source, "-o", output, "--model", checkpoint, "--broker", address, "--max-tokens", 8, "--json")
    first = run(*asked)
    assert (first.code, first.json["errors"], first.json["resumed"]) == (1, 1, 0)
    unsplit = Unsplit(checkpoint)
    hello, bye = (unsplit.say(f"user:{text}</s>assistant:", 8) for text in ("Hello", "Bye"))
    assert output.read_text() == f"{escaped(hello)}\n\n{escaped(bye)}\n"

    source.write_text("Hello\nshorter\nBye\n")
    again = run(*asked)
    assert (again.code, again.json["errors"], again.json["resumed"]) == (0, 0, 2)
    assert "resuming: 2 of 3 are already answered" in again.err
    assert 0 < again.json["tokens"] <= 8
    shorter = unsplit.say("user:shorter</s>assistant:", 8)
    assert output.read_text().splitlines() == [escaped(text) for text in (hello, shorter, bye)]
    # Nothing is left of a batch without errors, not even its lock, but by what it is recognized.
    assert [path.suffix for path in batches_dir().iterdir()] == [".done"]
    assert run("jobs", "list", "--json").json["batches"] == []

    written = output.stat().st_mtime_ns
    done = run(*asked)
    assert (done.code, done.json["resumed"], done.json["errors"], done.json["tokens"]) == (0, 3, 0, 0)
    assert f"{output} has the answers to all 3 lines already: nothing to do" in done.err
    others = "with answers to other lines or by other settings"
    assert (run(*asked, "--seed", 1).code, others in run(*asked, "--format", "csv").err) == (2, True)
    source.write_text("Hello\nBye\nshorter\n")
    assert (run(*asked).code, output.stat().st_mtime_ns) == (2, written)
    source.write_text("Hello\nshorter\nBye\n")
    output.write_text("something else")
    foreign = run(*asked)
    assert (foreign.code, "exists already: remove it, or give --overwrite" in foreign.err) == (2, True)
    assert output.read_text() == "something else"
    anew = run(*asked, "--overwrite")
    assert (anew.code, anew.json["resumed"]) == (0, 0)
    assert output.read_text().splitlines() == [escaped(text) for text in (hello, shorter, bye)]
    # As a process leaves it that is killed at its very end.
    (batches_dir() / "0123456789abcdef.lock").write_text("1")
    assert run("jobs", "prune", "--older-than", "0s").code == 0
    assert list(batches_dir().iterdir()) == []


def escaped(text: str) -> str:
    """A text as it is on one line of a file of texts."""
    return text.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")


def test_overwrite_goes_on_with_what_was_interrupted(tmp_path: Path) -> None:
    """Only a batch that has ended is answered anew: the same command goes on, whatever it says."""
    output = tmp_path / "out.jsonl"
    output.write_text("of an earlier batch")
    place = place_of(output)
    work = Work(place, tmp_path / "in.txt", output, "jsonl", None, False)
    begun = Record(
        source="in.txt", output=str(output), input_form="text", output_form="jsonl", lines=1, jobs=1, created=1.0
    )
    for record, goes_on in ((begun, True), (msgspec.structs.replace(begun, finished=2.0, errors=1), False)):
        place.write(record)
        place.store.write_bytes(b"")
        assert (work.check_new(True) == record) == goes_on
        assert place.store.exists() == goes_on
    place.write(begun)
    with pytest.raises(ConfigError, match="exists already"):
        work.check_new(False)


def test_a_file_of_somebody_else_is_not_replaced(
    run: Any, checkpoint: Path, address: str, worker: None, tmp_path: Path
) -> None:
    """Also not after a run with errors, whose own file may be replaced by a rerun."""
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("x" * 300)
    asked = ("batch", source, "-o", output, "--model", checkpoint, "--broker", address)
    assert run(*asked).code == 1
    output.write_text("something else")
    assert (run(*asked).code, output.read_text()) == (2, "something else")


def test_a_table_by_a_template(run: Any, checkpoint: Path, address: str, worker: None, tmp_path: Path) -> None:
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text('word,note\nHello,"a, b"\nBye,\n')
    asked = ("batch", source, "-o", output, "--model", checkpoint, "--broker", address, "--max-tokens", 8)
    wrong = run(*asked, "--template", "Say {name}")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert "the template's field 'name' is not among the fields here: 'word', 'note'" in wrong.err
    assert list(batches_dir().iterdir()) == []

    done = run(*asked, "--template", "Say {word}", "--progress", "lines")
    assert done.code == 0
    assert re.search(r"^batch-\w{16}: 2 lines of .*in\.csv to .*out\.csv$", done.err, re.MULTILINE)
    assert re.search(r"^batch-\w{16}: 0 of 2$", done.err, re.MULTILINE)
    unsplit = Unsplit(checkpoint)
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["word"], row["note"], row["answer"], row["error"]) for row in rows] == [
        (word, note, unsplit.say(f"user:Say {word}</s>assistant:", 8), "")
        for word, note in (("Hello", "a, b"), ("Bye", ""))
    ]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("in.txt", (), "give -o OUT, the file of answers"),
        ("in.txt", ("-o", "OUT", "--image"), "--image needs --output-dir"),
        ("in.txt", ("-o", "OUT", "--output-dir", "DIR"), "--output-dir needs --image"),
        ("in.txt", ("-o", "OUT", "--steps", "3"), "--steps needs --image"),
        ("in.txt", ("-o", "OUT", "--strength", "0.5"), "--strength needs --image"),
        ("in.txt", ("-o", "OUT", "--codec", "fp16"), "--codec fp16 is not for texts"),
        ("in.txt", ("-o", "OUT", "--reuse", "2"), "--reuse needs --image"),
        ("in.txt", ("-o", "OUT", "--max-images", "3"), "--max-images needs --image"),
        ("in.txt", ("--output-dir", "DIR", "--image", "--stop", "x"), "--stop is for texts"),
        ("in.txt", ("-o", "OUT", "--column", "x"), "--column is for tables"),
        ("in.txt", ("-o", "OUT", "--raw", "--system", "x"), "--raw and --system do not go together"),
        ("in.jsonl", ("-o", "OUT", "--template", "{x}"), "--template is for prompts"),
        ("in.txt", ("-o", "OUT", "--template", "x"), "it has no field"),
    ],
)
def test_wrong_usage_is_one_line_and_leaves_nothing(
    run: Any, tmp_path: Path, name: str, options: tuple[str, ...], message: str
) -> None:
    source = tmp_path / name
    source.write_text("Hello\n" if name == "in.txt" else json.dumps(chat("a", "x")))
    paths = {"OUT": str(tmp_path / "out"), "DIR": str(tmp_path / "dir")}
    done = run("batch", source, *(paths.get(option, option) for option in options))
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert message in done.err
    assert not batches_dir().exists() or list(batches_dir().iterdir()) == []


def test_lines_of_progress() -> None:
    """One at once, and one a minute."""
    now = [0.0]
    with stderr.capture() as capture:
        lines = Lines("batch-1", 500, lambda: 12.34, lambda: now[0])
        for seconds, done, failed in ((0, 100, 0), (30, 110, 0), (61, 120, 1), (62, 121, 1), (4000, 200, 2)):
            now[0] = seconds
            lines(done, failed)
    assert capture.get().splitlines() == [
        "batch-1: 100 of 500, 12.3 tokens/s",
        "batch-1: 120 of 500, 1 failed, 12.3 tokens/s, about 19 min left",
        "batch-1: 200 of 500, 2 failed, 12.3 tokens/s, about 3.3 h left",
    ]


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

    for stdout in ("/dev/stdout", "-"):
        assert main(["batch", str(source), "-o", stdout, *options]) == 0
        said = capfd.readouterr()
        assert json.loads(said.out)["custom_id"] == "a"
        assert re.search(r"1 line of \S+ to stdout\n", said.err)
        assert "stdout: 1 answered" in said.err
    assert main(["batch", str(source), "-o", "-", "--json", *options]) == 2
    assert "--json and -o - do not go together: both write to stdout" in capfd.readouterr().out
    assert main(["batch", str(source), "-o", "/dev/null", *options]) == 0
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.long
@pytest.mark.parametrize("kills", [(1, 1), (2, 3)])
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


def test_a_file_that_appears_meanwhile_is_not_replaced(
    run: Any, checkpoint: Path, address: str, worker: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write(tmp_path / "in.txt", "one", "two"), tmp_path / "out.csv"
    command = ("batch", source, "-o", output, "--max-tokens", 3, "--model", checkpoint, "--broker", address)
    run_jobs = batch_run._run_jobs

    def meddle(*arguments: Any) -> None:
        run_jobs(*arguments)
        output.write_text("precious")

    with monkeypatch.context() as patch:
        patch.setattr(batch_run, "_run_jobs", meddle)
        refused = run(*command)
    assert refused.code == 2
    assert f"{output} was written by something else meanwhile, and is not replaced" in refused.err
    assert output.read_text() == "precious"
    output.unlink()
    done = run(*command, "--json")
    assert (done.code, done.json["resumed"]) == (0, 2)
    assert len(output.read_text().splitlines()) == 3


@pytest.mark.parametrize("long", [False, True], ids=["answered", "errors"])
@pytest.mark.parametrize("killed_in", ["note_done", "now", "clear"])
def test_a_batch_that_is_killed_when_its_file_is_written(
    run: Any,
    checkpoint: Path,
    address: str,
    worker: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_in: str,
    long: bool,
) -> None:
    """The same command goes on: the file is its own."""
    source, output = write(tmp_path / "in.txt", "one", *(["long " * 600] if long else [])), tmp_path / "out.jsonl"
    command = ("batch", source, "-o", output, "--max-tokens", 3, "--model", checkpoint, "--broker", address)

    def die(*_: Any) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(batch_command if killed_in == "clear" else finish, killed_in, die)
        with pytest.raises(SystemExit):
            run(*command)
    written = output.read_text()
    assert len(written.splitlines()) == 1 + long
    done = run(*command, "--json")
    assert done.code == int(long), done.err
    assert output.read_text() == written
    assert (done.json["resumed"], done.json["tokens"]) == (1, 0)
    assert any(record.output == str(output) for _, record in places()) == long


def test_answers_of_an_overwriting_batch_stay(
    run: Any, checkpoint: Path, address: str, worker: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped before it replaced the file, and the command comes without --overwrite in between."""
    source, output = write(tmp_path / "in.txt", "one", "two"), tmp_path / "out.jsonl"
    command = ("batch", source, "-o", output, "--max-tokens", 3, "--model", checkpoint, "--broker", address)
    assert run(*command).code == 0

    def die(*_: Any) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(batch_run, "finish", die)
        with pytest.raises(SystemExit):
            run(*command, "--overwrite")
    assert "nothing to do" in run(*command).err
    done = run(*command, "--overwrite", "--json")
    assert (done.code, done.json["resumed"], done.json["tokens"]) == (0, 2, 0), done.err


def test_answers_that_are_not_used_with_other_settings_are_told(
    run: Any, checkpoint: Path, address: str, worker: None, tmp_path: Path
) -> None:
    # The second line fails, so the answer to the first one is kept.
    source, output = write(tmp_path / "in.txt", "one", "long " * 600), tmp_path / "out.csv"
    command = ("batch", source, "-o", output, "--model", checkpoint, "--broker", address)
    assert run(*command, "--max-tokens", 3).code == 1
    again = run(*command, "--max-tokens", 4)
    said = "note: 1 answer of an earlier run is not used, because its line or the settings have changed\n"
    assert said in again.err
    assert "note:" not in run(*command, "--max-tokens", 4).err


@pytest.mark.long
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
        _, err = batch.communicate(timeout=PATIENCE)
        assert batch.returncode == 130
        kept_answers = re.search(r"interrupted: (\d+) of 16 answers are kept, and the same command goes on", err)
        assert kept_answers is not None
    assert not place_of(output).lock.exists()
    with Store(place_of(output).store) as store:
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


def wait_for_tokens(output: Path, goal: int, batch: subprocess.Popen[str]) -> None:
    """Until a batch has so many tokens in its store."""
    deadline = time.monotonic() + PATIENCE
    while True:
        assert time.monotonic() < deadline, "the batch makes no progress"
        assert batch.poll() is None, "the batch has ended too early"
        if place_of(output).store.exists():
            with contextlib.suppress(Exception), Store(place_of(output).store) as store:
                if store.generated() >= goal:
                    return
        time.sleep(0.02)

"""Commands on many jobs: what they list, choose, cancel and export. No agent runs, unless a test says so."""

from __future__ import annotations

import csv
import datetime
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from split_common.system.lock import holding
from split_device.generation.settings import Sampling
from split_device.images.settings import ImageSettings
from split_device.jobs import waits
from split_device.jobs.agent import lock_path
from split_device.jobs.job import ImageChoice, ImageTask, Message, ModelChoice, Selection, Task, TextPiece, Update
from split_device.jobs.shown import prompt_of
from split_device.jobs.store import Store, store_path

MODEL = ModelChoice(name="/models/tiny")


def task(text: str, **sampling: Any) -> Task:
    return Task(model=MODEL, prompt=(Message("user", text),), sampling=Sampling(**sampling))


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, "PNG")
    return data.getvalue()


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store of its own for each test."""
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    with Store(store_path()) as opened:
        yield opened


def answered(store: Store, text: str, answer: str, group: str | None = None) -> str:
    """A job that has succeeded."""
    id_ = store.submit(task(text), group=group).id
    piece = TextPiece([1, 2], answer)
    store.write([Update(id=id_, piece=piece, prompt_tokens=3, state="succeeded", finish_reason="stop")])
    return id_


def failed(store: Store, text: str, group: str | None = None) -> str:
    id_ = store.submit(task(text), group=group).id
    store.write([Update(id=id_, state="failed", error="PromptTooLong: no room")])
    return id_


def test_a_list_shows_prompts_groups_and_how_many_there_are(run: Any, store: Store) -> None:
    for index in range(3):
        store.submit(task(f"Say\n {index}, and then {'much ' * 40}"), group="night" if index else None, priority=4)
    answered(store, "Which ocean?", "The Pacific", "day")
    done = run("jobs", "list", "--limit", 2)
    assert done.code == 0
    header, newest, second = done.out.splitlines()
    assert header.split() == ["job", "state", "priority", "group", "age", "made", "rate", "prompt"]
    assert [word in newest for word in ("succeeded", "day", "2 tokens", "Which ocean?")] == [True] * 4
    assert re.search(r" day +\d+[sm] ", newest)
    assert "Say 2, and" in second
    assert max(map(len, done.out.splitlines())) <= 80
    assert "2 of 4 jobs: 3 queued, 1 succeeded" in done.err

    listed = run("jobs", "list", "--group", "night", "--json").json
    assert (listed["total"], listed["counts"]["queued"], listed["counts"]["succeeded"]) == (2, 2, 0)
    assert [job["group"] for job in listed["jobs"]] == ["night", "night"]
    assert listed["jobs"][0]["title"].startswith("Say 2, and then much much")
    assert len(listed["jobs"][0]["title"]) <= 60
    assert run("jobs", "list", "--state", "succeeded", "--since", "1h", "--json").json["total"] == 1
    with store._db:
        store._db.execute("UPDATE jobs SET created = created - 7200")
    assert run("jobs", "list", "--since", "1h", "--json").json["jobs"] == []
    assert " 2h " in run("jobs", "list").out
    unknown = run("jobs", "list", "--group", "nobody's")
    assert (unknown.code, unknown.err) == (1, 'error: there is no group "nobody\'s"\n')
    # Without groups and priorities there are no such columns.
    answered(store, "Alone", "x")
    assert run("jobs", "list", "--limit", 1).out.split()[:5] == ["job", "state", "age", "made", "rate"]


def test_a_sealed_store_lists_prompts_with_its_key(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "sealed"))
    key = tmp_path / "store.key"
    with Store(store_path(), key) as sealed:
        sealed.submit(task("a secret prompt"), group="a secret group")
    assert "a secret prompt" in run("jobs", "list", "--store-key", key).out
    assert run("jobs", "list", "--group", "a secret group", "--store-key", key, "--json").json["total"] == 1
    assert run("jobs", "list").code == 2


def test_a_running_job_without_an_agent_is_interrupted(run: Any, store: Store) -> None:
    """And is running as soon as there is one. So it is in each command, and for `--state`."""
    id_ = store.submit(task("Hello"), group="night").id
    store.claim(1)
    assert run("jobs", "show", id_, "--json").json["state"] == "interrupted"
    assert "state: interrupted\n" in run("jobs", "show", id_).out
    assert " interrupted " in run("jobs", "list").out
    assert run("jobs", "list", "--state", "interrupted", "--json").json["total"] == 1
    assert run("jobs", "list", "--state", "running", "--json").json["total"] == 0
    counts = run("agent", "status", "--json").json["jobs"]
    assert (counts["interrupted"], counts["running"]) == (1, 0)
    assert run("jobs", "result", id_).err == f"error: {id_} was interrupted\n"
    with holding(lock_path()):
        assert run("jobs", "show", id_, "--json").json["state"] == "running"
        assert run("jobs", "list", "--state", "running", "--json").json["total"] == 1
        assert run("jobs", "list", "--state", "interrupted", "--json").json["total"] == 0
        counts = run("agent", "status", "--json").json["jobs"]
        assert (counts["interrupted"], counts["running"]) == (0, 1)
        assert "will be cancelled soon" in run("jobs", "cancel", id_).err
        assert "state: running, will be cancelled soon\n" in run("jobs", "show", id_).out
    # Nobody is left who would cancel it later.
    assert run("jobs", "cancel", id_).err == f"{id_} was cancelled\n"


def test_jobs_are_cancelled_and_retried_in_numbers(run: Any, store: Store) -> None:
    first, second, third = (store.submit(task(name), group="night").id for name in "abc")
    done, wrong = answered(store, "d", "x", "night"), failed(store, "e")
    other = store.submit(task("f")).id
    some = run("jobs", "cancel", first, done, "job-none")
    assert some.code == 1
    assert some.err.splitlines() == [
        f"error: {done} has succeeded already",
        "error: no job has the id job-none",
        "1 cancelled",
    ]
    again = run("jobs", "cancel", first, done, "--json")
    assert (again.code, again.json["jobs"]) == (1, [])
    assert [error["id"] for error in again.json["errors"]] == [first, done]
    assert run("jobs", "retry", first, "--json").json["state"] == "queued"

    group = run("jobs", "cancel", "--group", "night")
    assert (group.code, group.err) == (0, "3 cancelled\n")
    assert run("jobs", "cancel", "--group", "night").err == "no job was changed\n"
    retried = run("jobs", "retry", "--group", "night", "--json").json
    assert ([job["id"] for job in retried["jobs"]], retried["errors"]) == ([first, second, third], [])
    assert run("jobs", "cancel", "--state", "queued", "--group", "night").err == "3 cancelled\n"
    assert run("jobs", "retry", "--state", "failed").err.startswith("1 queued\n")
    assert [store.get(id_).state for id_ in (other, wrong)] == ["queued", "queued"]
    assert run("jobs", "cancel", "--state", "queued").err == "2 cancelled\n"


@pytest.mark.parametrize("command", ["cancel", "retry", "result"])
def test_which_jobs_has_to_be_said(run: Any, command: str) -> None:
    nothing = run("jobs", command)
    assert (nothing.code, "which jobs?" in nothing.err) == (2, True)
    both = run("jobs", command, "job-1", "--group", "night")
    assert (both.code, "but not both" in both.err) == (2, True)


def test_a_retry_says_if_the_error_will_come_again(run: Any, store: Store) -> None:
    wrong, unlucky = failed(store, "a"), store.submit(task("b")).id
    store.write([Update(id=unlucky, state="failed", error="NoWorker: no worker serves it")])
    assert run("jobs", "retry", unlucky).err == f"{unlucky} is queued\n"
    note = f"note: 1 of these will probably fail again; {wrong}: no room"
    assert run("jobs", "retry", "--state", "failed").err.splitlines() == ["1 queued", note]
    assert "error:" not in run("jobs", "show", wrong).out
    store.write([Update(id=wrong, state="failed", error="KeyError: 'x'")])
    assert "\nerror: KeyError: 'x'\n" in run("jobs", "show", wrong).out
    assert run("jobs", "show", wrong, "--json").json["error"] == "KeyError: 'x'"


def test_more_jobs_are_chosen_than_a_statement_takes_values(run: Any, store: Store) -> None:
    store.submit_all([(task("a"), 0, None)] * 3, "night")
    found = store.ids()
    assert store.count(Selection(ids=(*found, *(f"job-{number}" for number in range(300_000)))))["queued"] == 3


def test_messages_about_states_are_english(run: Any, store: Store) -> None:
    done, wrong, waiting = answered(store, "a", "x"), failed(store, "b"), store.submit(task("c")).id
    gone = store.cancel(store.submit(task("d")).id).id
    assert run("jobs", "cancel", gone).err == f"error: {gone} was cancelled already\n"
    assert run("jobs", "cancel", wrong).err == f"error: {wrong} has failed already\n"
    only = "only a failed or cancelled job can be retried"
    assert run("jobs", "retry", done).err == f"error: {done} has succeeded: {only}\n"
    assert run("jobs", "retry", waiting).err == f"error: {waiting} is queued: {only}\n"
    assert run("jobs", "result", gone).err == f"error: {gone} was cancelled\n"
    assert run("jobs", "result", wrong).err == f"error: {wrong} failed: no room\n"


def test_show_says_what_was_asked_and_with_which_settings(run: Any, store: Store) -> None:
    prompt = (Message("system", "Be terse."), Message("user", "Two\nlines"))
    settings = Sampling(max_tokens=17, temperature=0.5, seed=3)
    text = store.submit(Task(model=MODEL, prompt=prompt, sampling=settings, stop=("END",)), group="night").id
    shown = run("jobs", "show", text).out
    for line in (
        *("kind: text", "state: queued", "group: night", "made: 0 tokens", "model: /models/tiny", "layers: 2:-2"),
        *("max tokens: 17", "temperature: 0.5", "seed: 3", "stop: 'END'", "system: Be terse.", "user: Two"),
    ):
        assert f"{line}\n" in shown
    for line in ("cancelling", "steps", "None", "started", "rate"):
        assert line not in shown
    found = run("jobs", "show", text, "--json").json
    assert found["asked"]["prompt"][1] == {"role": "user", "content": "Two\nlines"}
    assert (found["asked"]["sampling"]["max_tokens"], found["asked"]["stop"]) == (17, ["END"])

    choice = ImageChoice(name="/models/sdxl", cut="A")
    image = store.submit(ImageTask(model=choice, prompt="a cat", settings=ImageSettings(steps=7, width=64))).id
    shown = run("jobs", "show", image).out
    for line in ("made: 0 of 7 steps", "cut: A", "steps: 7", "width: 64", "prompt: a cat"):
        assert f"{line}\n" in shown
    for line in ("tokens", "height", "guidance"):
        assert line not in shown


def test_times_are_iso_8601(run: Any, store: Store) -> None:
    found = run("jobs", "show", answered(store, "a", "x"), "--json").json
    assert found["started_at"] is None
    for name in ("created", "finished"):
        moment = datetime.datetime.fromisoformat(found[f"{name}_at"])
        assert found[f"{name}_at"].endswith("Z")
        assert abs(moment.timestamp() - found[name]) <= 0.001


def test_results_of_several_jobs(run: Any, store: Store) -> None:
    first, second = answered(store, "a", "one\ntwo", "night"), answered(store, "b", "three", "night")
    both = run("jobs", "result", second, first)
    assert both.out == f"==> {second} <==\nthree\n==> {first} <==\none\ntwo\n"
    assert run("jobs", "result", first).out == "one\ntwo\n"
    wrong = failed(store, "c", "night")
    group = run("jobs", "result", "--group", "night", "--json")
    assert (group.code, [job["text"] for job in group.json["jobs"]]) == (1, ["one\ntwo", "three"])
    assert group.json["errors"] == [{"id": wrong, "message": f"{wrong} failed: no room"}]
    assert run("jobs", "result", "--group", "night", "--state", "succeeded").code == 0
    assert "-o is for one image" in run("jobs", "result", first, second, "-o", "a.png").err


def test_images_of_several_jobs(run: Any, store: Store, tmp_path: Path) -> None:
    ids = [store.submit(ImageTask(model=ImageChoice(name="m"), prompt=str(n)), group="art").id for n in range(2)]
    text = answered(store, "a", "x", "art")
    store.write([Update(id=id_, image=png(), state="succeeded") for id_ in ids])
    assert "give --output-dir" in run("jobs", "result", *ids).err
    assert "give --output-dir" in run("jobs", "export", "--group", "art").err
    made = run("jobs", "result", *ids, "--output-dir", tmp_path / "results")
    assert (made.code, sorted(path.stem for path in (tmp_path / "results").iterdir())) == (0, sorted(ids))
    directory = tmp_path / "exported"
    out = tmp_path / "art.jsonl"
    run("jobs", "export", "--group", "art", "--output-dir", directory, "-o", out)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["file"] for record in records] == [*(str(directory / f"{id_}.png") for id_ in ids), None]
    assert (records[2]["id"], records[2]["answer"]) == (text, "x")
    with Image.open(records[0]["file"]) as image:
        assert image.size == (8, 8)
    single = tmp_path / "one.webp"
    assert run("jobs", "result", ids[0], "-o", single).code == 0
    assert single.exists()


def test_export(run: Any, store: Store, tmp_path: Path) -> None:
    first, second = answered(store, 'a, "b"', "one\ntwo\\", "night"), answered(store, "c", "three", "night")
    wrong = failed(store, "d", "night")
    store.cancel(store.submit(task("e"), group="night").id)
    answered(store, "elsewhere", "x")
    lines = run("jobs", "export", "--group", "night")
    assert lines.code == 0
    assert lines.err == "2 jobs exported; left out: 1 failed, 1 cancelled (--state exports them)\n"
    records = [json.loads(line) for line in lines.out.splitlines()]
    assert [(record["id"], record["prompt"], record["answer"]) for record in records] == [
        (first, 'a, "b"', "one\ntwo\\"),
        (second, "c", "three"),
    ]
    assert datetime.datetime.fromisoformat(records[0]["created_at"]).tzinfo is not None
    table = tmp_path / "out.csv"
    asked = ("jobs", "export", "--group", "night", "--state", "succeeded", "--state", "failed")
    found = run(*asked, "-o", table, "--json").json
    assert found == {"output": str(table), "jobs": 3, "left_out": {"cancelled": 1}}
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [row["answer"] for row in rows] == ["one\ntwo\\", "three", ""]
    assert (rows[2]["id"], rows[2]["error"], rows[2]["state"]) == (wrong, "PromptTooLong: no room", "failed")
    assert run("jobs", "export", second, first, "--format", "txt").out == "one\\ntwo\\\\\nthree\n"
    assert run("jobs", "export", "job-none").code == 1
    assert run("jobs", "export", "--group", "night", "--json").code == 2
    refused = run(*asked, "-o", table)
    assert (refused.code, "out.csv exists already: remove it, or give --overwrite" in refused.err) == (2, True)
    assert len(list(csv.DictReader(io.StringIO(table.read_text())))) == 3
    assert run("jobs", "export", first, "-o", table, "--overwrite").code == 0
    assert len(list(csv.DictReader(io.StringIO(table.read_text())))) == 1
    tabs = tmp_path / "out.tsv"
    assert run(*asked, "-o", tabs).code == 0
    assert [row["answer"] for row in csv.DictReader(io.StringIO(tabs.read_text()), delimiter="\t")] == [
        "one\ntwo\\",
        "three",
        "",
    ]
    # A file that cannot be written costs nothing.
    assert run("jobs", "export", "-o", tmp_path / "no" / "out.jsonl").code == 2


def test_a_dash_is_stdin(run: Any, store: Store, tmp_path: Path) -> None:
    asked = ("--model", tmp_path, "--json")
    ids = [run("submit", *words, *asked, stdin="Hello").json["id"] for words in (["-"], ["--file", "-"])]
    assert [prompt_of(store.get(id_).task) for id_ in ids] == ["Hello", "Hello"]
    assert run("submit", "-", *asked, stdin=" ").code == 2


def test_a_file_may_be_called_dash(run: Any, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-").write_text("Hi")
    submitted = run("submit", "--file", "./-", "--model", tmp_path, "--json", stdin="Hello")
    assert prompt_of(store.get(submitted.json["id"]).task) == "Hi"
    id_ = answered(store, "one", "two")
    exported = run("jobs", "export", id_, "--format", "txt", "-o", "./-", "--overwrite")
    assert (exported.out, Path("-").read_text()) == ("", "two\n")
    exported = run("jobs", "export", id_, "--format", "txt", "-o", "-")
    assert exported.err == "1 job exported to stdout\n"


@pytest.mark.parametrize("config", [b"{", b"[]", b"\xff", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_configuration_is_said_at_once(run: Any, store: Store, tmp_path: Path, config: bytes) -> None:
    (tmp_path / "config.json").write_bytes(config)
    refused = run("submit", "Hello", "--model", tmp_path)
    assert (refused.code, refused.out, "config.json is" in refused.err) == (1, "", True)
    assert store.jobs() == []


def test_each_line_is_a_job(run: Any, store: Store, tmp_path: Path) -> None:
    source = tmp_path / "prompts.txt"
    source.write_text("one\n\ntwo\nthree\n")
    options = ("--model", tmp_path, "--max-tokens", 7, "--group", "night", "--priority", 3, "--key", "k")
    done = run("submit", "--each-line", source, *options)
    ids = done.out.splitlines()
    assert (done.code, done.err.splitlines()[0]) == (0, "3 jobs submitted in group night")
    jobs = [store.get(id_) for id_ in ids]
    assert [prompt_of(job.task) for job in jobs] == ["one", "two", "three"]
    assert {(job.group, job.priority, job.task.sampling.max_tokens) for job in jobs} == {("night", 3, 7)}
    # The key of a line ends with its number, so the same file again adds nothing.
    source.write_text("one\n\ntwo\nthree\nfour\n")
    again = run("submit", "--each-line", source, *options, "--json").json
    assert (again["ids"][:3], again["jobs"], again["group"], again["errors"]) == (ids, 4, "night", [])
    assert store.submit(jobs[1].task, key="k-3").id == ids[1]

    piped = run("submit", "--each-line", "-", "--template", "Say {text}.", "--model", tmp_path, stdin="a\nb\n")
    assert [prompt_of(store.get(id_).task) for id_ in piped.out.splitlines()] == ["Say a.", "Say b."]
    table = tmp_path / "t.csv"
    table.write_text('name,question\nx,"Two\nlines"\n')
    found = run("submit", "--each-line", table, "--column", "question", "--model", tmp_path, "--json").json
    assert prompt_of(store.get(found["ids"][0]).task) == "Two\nlines"


def test_wrong_lines_are_left_out_and_said(run: Any, store: Store, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "one", "max_tokens": 5}, {"prompt": ""}, {"prompt": "three"}]
    source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    done = run("submit", "--each-line", source, "--model", tmp_path)
    assert (done.code, len(done.out.splitlines())) == (1, 2)
    assert "error: 1 line was left out; line 2: the prompt is empty" in done.err
    assert run("submit", "--each-line", source, "--model", tmp_path, "--json").json["errors"][0]["code"]
    source.write_text(json.dumps({"custom_id": "a", "url": "/v1/completions", "body": {}}))
    assert "`lambda-split batch` answers them" in run("submit", "--each-line", source, "--model", tmp_path).err


def test_each_line_is_an_image(run: Any, store: Store, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    asked = ("--image", "--image-model", tmp_path, "--steps", 3)
    done = run("submit", "--each-line", "-", *asked, stdin="a cat\na dog\n")
    jobs = [store.get(id_) for id_ in done.out.splitlines()]
    assert [(job.kind, job.task.prompt, job.task.settings.steps) for job in jobs] == [
        ("image", "a cat", 3),
        ("image", "a dog", 3),
    ]
    assert None not in {job.task.seed for job in jobs}


def test_ctrl_c_says_that_the_job_goes_on(store: Store, tmp_path: Path) -> None:
    """This process holds the agent's lock, and does nothing."""
    command = [sys.executable, "-m", "split_common", "submit", "Hello", "--wait", "--model", str(tmp_path)]
    with holding(lock_path()), subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None
        while not (line := waiting.stderr.readline()).startswith("job-"):
            assert line
        waiting.send_signal(signal.SIGINT)
        _, said = waiting.communicate(timeout=300)
    assert waiting.returncode == 130
    assert f"the job goes on: `lambda-split jobs watch {line.strip()}` follows it" in said
    assert store.get(line.strip()).state == "queued"


def test_watching_a_group_until_all_have_ended(run: Any, store: Store) -> None:
    """This process holds the agent's lock, and ends the jobs."""
    ids = [store.submit(task(name), group="night").id for name in "ab"]
    command = [sys.executable, "-m", "split_common", "jobs", "watch", "--group", "night"]
    with holding(lock_path()), subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stderr is not None
        assert watching.stderr.readline() == "night: 0 of 2\n"
        waits.say("the worker is gone")
        assert "the worker is gone" in watching.stderr.readline()
        store.write([Update(id=id_, state="succeeded") for id_ in ids])
        assert watching.communicate(timeout=300)[1] == "night: 2 succeeded\n"
    assert watching.returncode == 0
    wrong = failed(store, "c", "night")
    ended = run("jobs", "watch", "--group", "night", "--json")
    assert (ended.code, ended.json["counts"]["succeeded"], ended.json["failed"]) == (1, 2, [wrong])
    said = run("jobs", "watch", *ids, wrong).err
    assert f"the first to fail: {wrong}: no room\n" in said
    assert "night" not in said
    assert run("jobs", "watch", *ids).code == 0
    assert run("jobs", "watch", "--state", "succeeded").err.splitlines()[-1] == "jobs: 2 succeeded"
    assert run("jobs", "watch", "--state", "queued").err.splitlines()[-1] == "jobs: none"
    assert run("jobs", "watch", "--group", "night", "--state", "failed", "--json").json["failed"] == [wrong]
    assert run("jobs", "watch").code == 2
    assert run("jobs", "watch", "--group", "nobody's").code == 1

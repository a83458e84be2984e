"""Files of requests as they are written by others: encodings, ends of lines, pipes, and sizes beyond memory."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from split_common.errors import ConfigError, JobsError
from split_device.jobs.job import ModelChoice, TextPiece, Update
from split_device.jobs.store import Store
from split_device.openai import batch_requests
from split_device.openai.batch_file import BatchJobs, write
from split_device.openai.batch_requests import Line, open_requests

MODEL = ModelChoice(name="m")


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))


def request(name: str, prompt: str = "Hello", **body: Any) -> str:
    fields = {"model": "x", "prompt": prompt, **body}
    return json.dumps({"custom_id": name, "url": "/v1/completions", "body": fields}, ensure_ascii=False)


def lines_of(path: Path) -> list[Line]:
    with open_requests(path, MODEL) as requests:
        return list(requests)


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    prompt = "one\u2028two\u2029three\x85four"
    path.write_bytes("\r\n".join([request("a", prompt), "", request("b"), request("c")]).encode("utf-8-sig"))
    lines = lines_of(path)
    assert [(line.number, line.custom_id, line.error) for line in lines] == [
        (1, "a", None),
        (3, "b", None),
        (4, "c", None),
    ]
    assert lines[0].query is not None
    assert lines[0].query.tasks[0].prompt == prompt


def test_errors_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    chat = {"model": "x", "messages": [{"role": "user", "content": "x"}, {"role": "user", "content": 5}]}
    lines = [
        request("a").encode(),
        request("naïve").encode("latin-1"),
        b'{"custom_id": "\\ud83d"}',
        json.dumps({"custom_id": "b", "url": "/v1/chat/completions", "body": chat}).encode(),
        request("a").encode(),
        b"x" * (batch_requests.MAX_LINE + 1),
        request("last").encode(),
    ]
    path.write_bytes(b"\n".join(lines))
    errors = [line.error["message"] if line.error else None for line in lines_of(path)]
    assert errors == [
        None,
        "line 2: the line is not UTF-8",
        "line 3: the line is not JSON: half of a surrogate pair",
        "line 4: messages[1].content: Expected `str | array`, got `int`",
        "line 5: an earlier line has the custom_id 'a'",
        "line 6: the line has more than 4194304 bytes",
        None,
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (request("a").encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (request("a").encode("utf-16-le"), "is not text: it has a NUL byte"),
        (b"\xef\xbb\xbf\n \r\n", "has no lines"),
        (b"", "has no lines"),
        (None, "cannot be read"),
    ],
)
def test_a_file_without_requests_is_refused(tmp_path: Path, data: bytes | None, words: str) -> None:
    path = tmp_path / "in.jsonl"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        lines_of(path)


def test_a_pipe_is_read_twice(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(request("a") + "\n",))
    writer.start()
    with open_requests(path, MODEL) as requests:
        assert [line.custom_id for line in requests] == [line.custom_id for line in requests] == ["a"]
    writer.join()


def test_a_file_that_is_changed_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    for changed in (request("a", "another"), f"{request('a')}\n{request('b')}", ""):
        path.write_text(request("a"))
        with (
            open_requests(path, MODEL) as requests,
            Store(tmp_path / "state" / "jobs.db") as store,
            BatchJobs(requests, store) as jobs,
        ):
            path.write_text(changed)
            with pytest.raises(JobsError, match="was changed meanwhile"):
                list(jobs.records())


def test_jobs_of_another_file_are_removed_and_failed_ones_run_again(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    with Store(tmp_path / "state" / "jobs.db") as store:
        path.write_text(f"{request('a', n=2)}\n{request('b')}\n")
        with open_requests(path, MODEL) as requests, BatchJobs(requests, store) as jobs:
            assert jobs.jobs == 3
            kept = store.jobs()[0].id
        for job in store.claim(3):
            store.write([Update(id=job.id, state="failed", error="X: y")])
        path.write_text(f"{request('b')}\n{request('c')}\n")
        with open_requests(path, MODEL) as requests, BatchJobs(requests, store) as jobs:
            assert (jobs.jobs, jobs.ended) == (2, 0)
            assert store.get(kept).state == "queued"
            assert store.count()["queued"] == 2


def test_a_file_larger_than_memory(tmp_path: Path) -> None:
    """All of it, and all of its answers, are never in memory at once."""
    path, count, size = tmp_path / "in.jsonl", 40, 1024**2
    with path.open("w") as file:
        for index in range(count):
            file.write(request(str(index), "x" * size) + "\n")
    tracemalloc.start()
    try:
        with (
            open_requests(path, MODEL) as requests,
            Store(tmp_path / "state" / "jobs.db") as store,
            BatchJobs(requests, store) as jobs,
        ):
            while claimed := store.claim(1):
                store.write([Update(id=claimed[0].id, piece=TextPiece([1], "y" * size), state="succeeded")])
            assert write(tmp_path / "out.jsonl", jobs.records()) == (count, 0)
        assert tracemalloc.get_traced_memory()[1] < count * size / 2
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out.jsonl").stat().st_size > count * size

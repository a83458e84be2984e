"""Answers that end lines for some readers, control terminals, or lack in an encoding; names that are not UTF-8."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import tiny
from fleet import serving_here
from serving import Unsplit
from split_common.cli import main
from split_common.system.process import running_command
from split_common.system.text import for_terminal
from split_device.jobs.job import Message
from split_device.jobs.store import Store, store_path

#: Seconds that something in another process may take on a busy machine.
PATIENCE = 300.0

#: With them, and at temperature 2, every character of the model comes.
SEED = 3
TOKENS = 300


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.save("llama", tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=1024)
    tiny.save_tokenizer(directory, tiny.ODD_CHARACTERS)
    # Nothing ends an answer too early.
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": None}))
    return directory


@pytest.fixture(scope="module")
def answer(checkpoint: Path) -> str:
    """What the unsplit model says; it has all odd characters."""
    text = Unsplit(checkpoint).say("Hello", TOKENS, SEED, temperature=2.0, top_p=1.0)
    assert set(tiny.ODD_CHARACTERS) <= set(text)
    return text


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    with serving_here(checkpoint) as address:
        yield address


def generate(checkpoint: Path, address: str, *more: str) -> list[str]:
    sampling = ["--temperature", "2", "--seed", str(SEED), "--max-tokens", str(TOKENS)]
    return ["generate", "Hello", "--raw", "--model", str(checkpoint), "--broker", address, *sampling, *more]


def printed(descriptors: tuple[int, int], encoding: str, arguments: list[str], patch: pytest.MonkeyPatch) -> str:
    """What a command prints on a pipe, or on a terminal, of an encoding.

    Args:
        descriptors: the end that is read, and the one that is written to.
    """
    reading, writing = descriptors
    chunks: list[bytes] = []

    def read() -> None:
        # A terminal whose other end is closed has an error instead of an end.
        with contextlib.suppress(OSError):
            while chunk := os.read(reading, 65536):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with patch.context() as inner, open(writing, "w", encoding=encoding, newline="") as stdout:  # noqa: PTH123
            inner.setattr(sys, "stdout", stdout)
            assert main(arguments) == 0
    finally:
        reader.join()
        os.close(reading)
    return b"".join(chunks).decode(encoding)


@pytest.mark.parametrize(
    "encoding", ["latin-1", *(pytest.param(name, marks=pytest.mark.long) for name in ("utf-8", "ascii"))]
)
def test_a_pipe_of_any_encoding_takes_the_answer(
    checkpoint: Path, address: str, answer: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(os.pipe(), encoding, generate(checkpoint, address), monkeypatch)
    assert text == answer.encode(encoding, "backslashreplace").decode(encoding) + "\n"
    line = printed(os.pipe(), encoding, generate(checkpoint, address, "--json"), monkeypatch)
    assert len(line.splitlines()) == 1
    assert json.loads(line)["text"] == answer


def test_a_terminal_obeys_no_answer(
    checkpoint: Path, address: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = printed(os.openpty(), "utf-8", generate(checkpoint, address), monkeypatch)
    assert "\x1b" in answer
    assert terminal.replace("\r\n", "\n") == for_terminal(answer) + "\n"


@pytest.mark.long
def test_records_are_lines_for_any_reader(checkpoint: Path, address: str, answer: str, tmp_path: Path) -> None:
    """In a file of answers whose name is not UTF-8, and in a stream of events."""
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": TOKENS, "temperature": 2, "seed": SEED}
    source, output = tmp_path / "in.jsonl", tmp_path / "r\udce9ponses.jsonl"
    source.write_text(json.dumps({"custom_id": "a", "url": "/v1/completions", "body": body}))
    options = ["--model", str(checkpoint), "--broker", address]
    assert main(["batch", str(source), "-o", str(output), *options]) == 0
    (line,) = output.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["response"]["body"]["choices"][0]["text"] == answer
    with running_command(["serve", "--port", "0", *options]) as (_, facts):
        asked = httpx2.post(f"{facts['url']}/completions", json=body | {"stream": True}, timeout=PATIENCE)
    events = [line for line in asked.text.splitlines() if line]
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer


@pytest.mark.parametrize("option", ["--system", "--member", "--dtype", "--broker"])
def test_texts_of_options_are_utf_8(run: Any, checkpoint: Path, option: str) -> None:
    refused = run("generate", "Hello", "--model", checkpoint, option, "\udce9")
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("command", ["generate", "submit"])
def test_a_model_in_a_directory_that_is_not_utf_8(
    run: Any, checkpoint: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "r\udce9sultats"
    home.mkdir()
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(home / "state"))
    monkeypatch.chdir(home)
    listed = run("jobs", "list", "--json").json
    assert (listed["jobs"], listed["batches"]) == ([], [])
    (home / "m").mkdir()
    refused = run(command, "Hello", "--model", "m")
    assert (refused.code, refused.err) == (2, "error: the model's path is not UTF-8\n")


def test_prompts_from_files_and_pipes(
    run: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    wide, plain = tmp_path / "wide", tmp_path / "na\udcefve.txt"
    wide.write_text("Hello", encoding="utf-16")
    plain.write_bytes("Hello".encode("utf-8-sig"))
    options = ("--model", checkpoint)
    refused = run("submit", "--file", wide, *options)
    assert (refused.code, refused.err) == (2, f"error: {wide} is UTF-16: save it as UTF-8\n")
    added = run("submit", "--file", plain, *options, "--json")
    assert added.code == 0
    with Store(store_path()) as store:
        assert store.get(added.json["id"]).task.prompt == (Message("user", "Hello"),)
    bad = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    refused = run("generate", "-", *options, stdin=bad)
    assert (refused.code, refused.err) == (2, "error: stdin is not UTF-8\n")


def test_a_piped_conversation(run: Any, checkpoint: Path, address: str) -> None:
    typed = "\ufeffHello \r\n\n/reset\nNo\x0blonger\u2028here\n/quit\nnot said\n"
    piped = io.TextIOWrapper(io.BytesIO(typed.encode()), encoding="utf-8")
    options = ("--model", checkpoint, "--broker", address, "--max-tokens", 4)
    done = run("chat", *options, "--json", stdin=piped)
    assert done.code == 0
    assert [turn["prompt"] for turn in done.json["turns"]] == ["Hello", "No\x0blonger\u2028here"]

"""What users are told when their worker goes, and when another one comes: real workers, a real server."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect
from rich.console import Console

from chat_page import answered, chromium, needs_chromium, opened, say, unlock
from fleet import running_broker, start_worker
from serving import KEY
from split_broker.broker import Broker
from split_common.errors import NoWorker, WorkerGone, WorkerSlow
from split_common.system.process import running_command
from split_device import Connection
from split_device.cli import terminal
from split_device.sessions.notices import WorkerWait
from split_worker.worker import Worker
from wiretap import wait_until

TOKENS = 60


@pytest.fixture(scope="module")
def broker() -> Iterator[Any]:
    with running_broker() as broker:
        yield broker


class Relief:
    """A worker that leaves once it has computed a few steps. Another one comes when `may_come` is set."""

    def __init__(self, checkpoint: Path, broker: Broker) -> None:
        self.may_come = threading.Event()
        self._checkpoint, self._broker = checkpoint, broker
        self.first = start_worker(checkpoint, broker.address)
        self.second: Worker | None = None
        self._pool = ThreadPoolExecutor(1)
        self._done = self._pool.submit(self._run)

    def _run(self) -> None:
        wait_until(lambda: self.first.counters["steps"] > 5, timeout=300.0)
        self.first.stop()
        assert self.may_come.wait(300.0)
        self.second = start_worker(self._checkpoint, self._broker.address)

    def __enter__(self) -> Relief:
        return self

    def __exit__(self, *_: object) -> None:
        self.may_come.set()
        try:
            self._done.result(300.0)
        finally:
            for worker in (self.first, self.second):
                if worker is not None:
                    worker.stop()
            self._pool.shutdown()


def waiting(name: str, checkpoint: Path, broker: Broker) -> str:
    """What is said when the only worker has gone."""
    command = f"lambda-split worker --model {checkpoint} --layers 2:4 --broker {broker.address}"
    return f"worker {name} is gone: waiting 60 s for another one; start one with `{command}`"


def without_search(lines: list[str]) -> list[str]:
    """Without what is said only if the search for another worker takes long."""
    return [line for line in lines if not line.endswith("looking for another one")]


class Screen(io.StringIO):
    """A file that calls back for each piece of text."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        super().__init__()
        self._on_text = on_text

    def write(self, text: str) -> int:
        self._on_text(text)
        return super().write(text)


def test_generate_says_that_its_worker_is_gone_and_goes_on_with_the_next(
    run: Any, checkpoint: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Relief(checkpoint, broker) as relief:
        screen = Screen(lambda text: relief.may_come.set() if "waiting" in text else None)
        monkeypatch.setattr(terminal, "stderr", Console(file=screen))
        options = ["--model", checkpoint, "--broker", broker.address, "--max-tokens", TOKENS]
        done = run("generate", "Hello", *options, "--json")
        assert done.code == 0, done.err
        assert done.json["tokens"] > 5
        assert relief.second is not None
        assert without_search(screen.getvalue().splitlines()) == [
            waiting(relief.first.name, checkpoint, broker),
            f"worker {relief.second.name} has taken over",
        ]
        assert relief.first.name != relief.second.name


def test_a_worker_that_stalled_is_back() -> None:
    said: list[str] = []
    wait = WorkerWait(said.append, 60, "lambda-split worker")
    wait.failed(WorkerGone("worker a is gone"), 0.0)
    wait.failed(NoWorker("no worker serves it"), 0.5)
    wait.over("a")
    assert said[1:] == ["worker a is back"]
    wait.failed(WorkerSlow("worker a has not answered for 60 s"), 90.0)
    wait.over("a")
    assert said[2:] == ["worker a has not answered for 60 s; worker a is back"]
    wait.failed(WorkerGone("worker a/1 is gone"), 190.0)
    wait.over("a")
    assert said[3:] == ["worker a/1 is gone; worker a has taken over"]


def test_a_stream_says_so_in_lines_that_clients_pass_over(checkpoint: Path, broker: Broker) -> None:
    with Relief(checkpoint, broker) as relief:
        options = ["serve", "--port", "0", "--model", str(checkpoint), "--broker", broker.address]
        with running_command(options, env={"LAMBDA_SPLIT_API_KEY": KEY}) as (_, facts):
            lines = list(_stream(facts["url"], lambda: relief.may_come.set()))
        comments = without_search([line for line in lines if line.startswith(":")])
        assert relief.second is not None
        assert comments == [
            f": {waiting(relief.first.name, checkpoint, broker)}",
            f": worker {relief.second.name} has taken over",
        ]
        assert lines[-1] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert not any("error" in event for event in events)
        # The comments stand between the pieces of the answer.
        assert lines.index(comments[1]) < max(lines.index(f"data: {json.dumps(events[-1])}"), len(lines) - 1)


def _stream(url: str, on_comment: Callable[[], None]) -> Iterator[str]:
    """The lines of a streamed answer that are not empty."""
    split = urlsplit(url)
    assert split.hostname is not None
    connection = http.client.HTTPConnection(split.hostname, split.port, timeout=300.0)
    try:
        body = {"model": "tiny", "prompt": "Hello", "stream": True, "max_tokens": TOKENS, "temperature": 0}
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        connection.request("POST", f"{split.path}/completions", json.dumps(body), headers)
        for line in connection.getresponse():
            if text := line.decode().strip():
                if text.startswith(":"):
                    on_comment()
                yield text
    finally:
        connection.close()


@pytest.mark.long
@needs_chromium
def test_the_chat_page_says_so_until_the_answer_goes_on(checkpoint: Path, broker: Broker) -> None:
    options = ["serve", "--port", "0", "--model", str(checkpoint), "--broker", broker.address]
    with contextlib.ExitStack() as stack:
        relief = stack.enter_context(Relief(checkpoint, broker))
        _, facts = stack.enter_context(running_command(options, env={"LAMBDA_SPLIT_API_KEY": KEY}))
        page = stack.enter_context(opened(stack.enter_context(chromium()), facts["url"].removesuffix("v1")))
        say(unlock(page), "Hello", TOKENS)
        expect(page.get_by_role("alert")).to_have_text(waiting(relief.first.name, checkpoint, broker))
        expect(page.get_by_role("status")).to_have_text("Waiting …")
        relief.may_come.set()
        answered(page)
        expect(page.get_by_role("alert")).to_have_count(0)


def test_without_a_place_of_its_own_a_notice_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    from split_device.sessions.notices import Notices

    Notices(Connection().on_notice).say("worker a is gone")
    assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", "worker a is gone")]

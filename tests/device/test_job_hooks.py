"""What happens when jobs have ended: programs that are run, and URLs that are called."""

from __future__ import annotations

import http.server
import json
import logging
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from split_common.errors import ConfigError
from split_device.jobs.hooks import Action, command_action, webhook_action
from split_device.jobs.job import ModelChoice, Task, Update
from split_device.jobs.notify import Notifier
from split_device.jobs.store import Store, store_path
from wiretap import wait_until

#: Seconds that something in another thread or process may take on a busy machine.
PATIENCE = 60.0


def task(text: str) -> Task:
    return Task(model=ModelChoice(name="/models/tiny"), prompt=text)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    with Store(store_path()) as opened:
        yield opened


@pytest.fixture
def notifier(store: Store) -> Iterator[Notifier]:
    made = Notifier(store, pauses=(0.0, 0.0))
    yield made
    made.stop()


class Server:
    """An HTTP server on the loopback that keeps what is posted, and answers with the statuses that are put in."""

    def __init__(self) -> None:
        self.posted: list[dict[str, Any]] = []
        self.statuses: list[int] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.posted.append(json.loads(body))
                self.send_response(outer.statuses.pop(0) if outer.statuses else 204)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def turned(notifier: Notifier, condition: Any) -> None:
    """Waits for a condition while the notifier works."""

    def met() -> bool:
        notifier.turn()
        return bool(condition())

    wait_until(met, PATIENCE)


def written(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def echo(path: Path) -> Action:
    """Adds a line to a file."""
    line = 'echo "$LAMBDA_SPLIT_JOB,$LAMBDA_SPLIT_GROUP,$LAMBDA_SPLIT_JOB_STATE,$PWD"'
    return command_action(f"sh -c {shlex.quote(f'{line} >> {shlex.quote(str(path))}')}")


def test_a_command_at_the_end_of_a_job(store: Store, notifier: Notifier, tmp_path: Path) -> None:
    """Once for each end: a job that is tried again ends again."""
    out = tmp_path / "out"
    id_ = store.submit(task("Hello"), group="night").id
    store.hooks.add([echo(out)], [id_])
    # The same action twice is one.
    store.hooks.add([echo(out)], [id_])
    assert store.hooks.due() == []
    store.write([Update(id=id_, state="failed", error="x")])
    turned(notifier, lambda: written(out))
    assert written(out) == [f"{id_},night,failed,{Path.cwd()}"]
    assert store.hooks.due() == []
    store.retry(id_)
    store.write([Update(id=id_, state="succeeded")])
    turned(notifier, lambda: len(written(out)) == 2)
    assert ",succeeded," in written(out)[1]


def test_ctrl_c_does_not_run_a_command_again(
    store: Store, notifier: Notifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is pressed when the command has been started, and nobody has noted it yet."""

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            signal.raise_signal(signal.SIGINT)

    out = tmp_path / "out"
    id_ = store.submit(task("Hello")).id
    store.hooks.add([echo(out)], [id_])
    store.write([Update(id=id_, state="succeeded")])
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        notifier.turn()
    wait_until(lambda: written(out), PATIENCE)
    assert store.hooks.due() == []


def test_a_command_at_the_end_of_a_group(store: Store, notifier: Notifier, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ids = [store.submit(task(str(number)), group="night").id for number in range(3)]
    store.submit(task("elsewhere"))
    store.hooks.add([echo(out)], group="night")
    store.write([Update(id=ids[0], state="succeeded")])
    store.cancel(ids[1])
    store.claim(9)
    assert store.hooks.due() == []
    store.write([Update(id=ids[2], state="succeeded")])
    (due,) = store.hooks.due()
    assert (due.job, due.group, due.state) == (None, "night", "cancelled")
    assert due.counts == {"succeeded": 2, "failed": 0, "cancelled": 1}
    turned(notifier, lambda: written(out))
    assert written(out) == [f",night,cancelled,{Path.cwd()}"]


def test_what_a_failing_command_does(
    store: Store, notifier: Notifier, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is noted in the log, without the command, and the job is as it was."""
    id_ = store.cancel(store.submit(task("Hello")).id).id
    gone = tmp_path / "gone"
    gone.write_text("#!/bin/sh\n")
    gone.chmod(0o700)
    store.hooks.add([command_action("sh -c 'exit 7'"), command_action(str(gone))], [id_])
    gone.unlink()
    with caplog.at_level(logging.WARNING):
        turned(notifier, lambda: "exit code 7" in caplog.text)
    assert f"the command at the end of {id_} ended with exit code 7" in caplog.text
    assert f"the command at the end of {id_} cannot be run: No such file" in caplog.text
    assert str(gone) not in caplog.text
    assert (store.get(id_).state, store.hooks.due()) == ("cancelled", [])


def test_a_webhook(store: Store, notifier: Notifier, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """It has ids, states and groups, and no text. It is tried again, and given up in the end."""
    first = store.submit(task("a secret"), group="night").id
    store.hooks.add([webhook_action(server.url)], [first])
    store.hooks.add([webhook_action(server.url)], group="night")
    server.statuses = [500]
    store.write([Update(id=first, state="failed", error="a secret")])
    turned(notifier, lambda: not store.hooks.due())
    counts = {"succeeded": 0, "failed": 1, "cancelled": 0}
    one = {"event": "job.ended", "id": first, "group": "night", "state": "failed"}
    all_ = {"event": "group.ended", "id": None, "group": "night", "state": "failed", "counts": counts}
    assert sorted(server.posted, key=str) == sorted([one, all_, server.posted[0]], key=str)

    second = store.cancel(store.submit(task("b")).id).id
    store.hooks.add([webhook_action(server.url)], [second])
    # A redirection is not followed.
    server.statuses = [503, 302, 404]
    with caplog.at_level(logging.WARNING):
        turned(notifier, lambda: not store.hooks.due())
    assert f"the webhook at the end of {second} failed, and is given up: status 404" in caplog.text
    assert server.url not in caplog.text


def test_a_call_that_was_interrupted_is_made_again(store: Store, server: Server) -> None:
    """As when the agent is stopped between two attempts."""
    id_ = store.cancel(store.submit(task("Hello")).id).id
    store.hooks.add([webhook_action(server.url)], [id_])
    server.statuses = [500]
    first = Notifier(store, pauses=(PATIENCE * 10,))
    turned(first, lambda: server.posted)
    first.stop()
    assert store.hooks.due()
    turned(Notifier(store), lambda: not store.hooks.due())
    assert len(server.posted) == 2


def test_actions_are_sealed_and_removed_with_their_jobs(tmp_path: Path) -> None:
    path = tmp_path / "sealed" / "jobs.db"
    with Store(path, tmp_path / "store.key") as store:
        id_ = store.submit(task("Hello"), group="night").id
        store.hooks.add([webhook_action("https://a.example/secret-token")], [id_])
        store.hooks.add([webhook_action("https://a.example/secret-token")], group="night")
        wal = path.with_name("jobs.db-wal").read_bytes()
        assert b"secret-token" not in path.read_bytes() + wal
        store.cancel(id_)
        assert [hook.action.webhook for hook in store.hooks.due()] == ["https://a.example/secret-token"] * 2
        store.prune(2**40)
        assert store._db.execute("SELECT count(*) FROM hooks").fetchone()[0] == 0


@pytest.mark.parametrize(
    "url",
    [
        *("http://a.example/", "ftp://127.0.0.1/", "https://", "https://user:word@a.example/", "https://a b/"),
        *("http://127.0.0.1.a.example/", "http://[::2]/", "https://a.example:port/", "https://ä.example/"),
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="invalid webhook"):
        webhook_action(url)


def test_options_of_submit(run: Any, store: Store, tmp_path: Path) -> None:
    asked = ("--model", tmp_path, "--on-done", "sh -c true", "--webhook", "https://a.example/x")
    id_ = run("submit", "Hello", *asked).out.strip()
    shown = run("jobs", "show", id_)
    assert "on done: sh -c true\non done: https://a.example/x\n" in shown.out
    assert run("jobs", "show", id_, "--json").json["on_done"][0]["command"] == ["sh", "-c", "true"]
    # With a group, it is the group's: once, and not for each job.
    run("submit", "--each-line", "-", "--group", "night", *asked, stdin="a\nb\n")
    run("jobs", "cancel", "--group", "night")
    assert [(hook.job, hook.group) for hook in store.hooks.due()] == [(None, "night")] * 2
    ids = run("submit", "--each-line", "-", *asked, stdin="a\nb\n").out.splitlines()
    assert [len(store.hooks.of_job(each)) for each in ids] == [2, 2]
    for wrong in (("--on-done", "'"), ("--on-done", "no-such-program x"), ("--webhook", "http://a.example")):
        refused = run("submit", "Hello", "--model", tmp_path, *wrong)
        assert (refused.code, refused.err.count("\n")) == (2, 1)

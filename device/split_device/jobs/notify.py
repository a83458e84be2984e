"""Runs the programs and calls the URLs that users asked for at the end of their jobs."""

from __future__ import annotations

import http.client
import logging
import os
import queue
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import msgspec

from split_common.system.signals import PARENT, delay_signals
from split_device.jobs.hooks import LOOPBACK, DueHook
from split_device.jobs.store import Store

log = logging.getLogger(__name__)

#: Interval between two looks for jobs that have ended, in seconds.
LOOK_INTERVAL = 1.0

#: Most programs and calls at once; others wait.
AT_ONCE = 16

#: How long a webhook's server may take to answer, in seconds.
ANSWER_TIMEOUT = 10.0

#: Pauses before a webhook is called again after a failure, in seconds. Then it is given up.
PAUSES = (5.0, 30.0)

#: Variables that only a job or only a group has; a program does not get those of the agent.
_VARIABLES = ("LAMBDA_SPLIT_JOB", "LAMBDA_SPLIT_GROUP", "LAMBDA_SPLIT_JOB_STATE")


class Notifier:
    """Does what is due. Belongs to the thread of the store.

    A program is noted as done once it has been started, and a call once it has been answered or given up. So what
    the agent's death interrupts is done again by the next agent: at least once, seldom twice. A signal waits until
    what was done is noted.

    Args:
        pauses: before each further attempt to call a URL, in seconds.
    """

    def __init__(self, store: Store, pauses: tuple[float, ...] = PAUSES) -> None:
        self._store = store
        self._pauses = pauses
        self._programs: list[tuple[DueHook, subprocess.Popen[bytes]]] = []
        self._calls: set[int] = set()
        #: Filled by the threads of calls: a hook, and why it was given up.
        self._called: queue.SimpleQueue[tuple[DueHook, str | None]] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._look_at = 0.0

    def turn(self) -> None:
        """Notes what has ended, and starts what is due. Does not wait."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_INTERVAL
        self._collect()
        for hook in self._store.hooks.due():
            if len(self._programs) + len(self._calls) >= AT_ONCE:
                break
            if hook.action.webhook is None:
                self._run(hook)
            elif hook.number not in self._calls:
                self._calls.add(hook.number)
                threading.Thread(target=self._call, args=(hook, hook.action.webhook), daemon=True).start()

    def stop(self) -> None:
        """Lets programs go on, and calls be made again by the next agent."""
        self._stopped.set()
        self._collect()

    @delay_signals()
    def _collect(self) -> None:
        while not self._called.empty():
            hook, problem = self._called.get()
            if problem is not None:
                log.warning("the webhook at the end of %s failed, and is given up: %s", _of(hook), problem)
            self._store.hooks.done(hook.number)
            self._calls.discard(hook.number)
        for entry in list(self._programs):
            hook, program = entry
            if (code := program.poll()) is not None:
                self._programs.remove(entry)
                if code:
                    log.warning("the command at the end of %s ended with exit code %d", _of(hook), code)

    @delay_signals()
    def _run(self, hook: DueHook) -> None:
        action = hook.action
        kept = {name: value for name, value in os.environ.items() if name not in (PARENT, *_VARIABLES)}
        try:
            program = subprocess.Popen(
                action.command,
                cwd=action.directory if Path(action.directory).is_dir() else Path.home(),
                env=kept | _environment(hook),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            log.warning("the command at the end of %s cannot be run: %s", _of(hook), error.strerror)
        else:
            self._programs.append((hook, program))
        self._store.hooks.done(hook.number)

    def _call(self, hook: DueHook, url: str) -> None:
        """Calls a URL until it answers, or is given up. In a thread of its own."""
        problem: str | None = None
        for pause in (0.0, *self._pauses):
            if self._stopped.wait(pause):
                return
            problem = _post(url, _body(hook))
            if problem is None:
                break
        self._called.put((hook, problem))


def _of(hook: DueHook) -> str:
    """What ended, for the log, which has no names of groups: they may be secret."""
    return hook.job if hook.job is not None else "a group"


def _environment(hook: DueHook) -> dict[str, str]:
    found = {"LAMBDA_SPLIT_JOB": hook.job, "LAMBDA_SPLIT_GROUP": hook.group, "LAMBDA_SPLIT_JOB_STATE": hook.state}
    return {name: value for name, value in found.items() if value is not None}


def _body(hook: DueHook) -> dict[str, Any]:
    event = "job.ended" if hook.job is not None else "group.ended"
    counts = {} if hook.counts is None else {"counts": hook.counts}
    return {"event": event, "id": hook.job, "group": hook.group, "state": hook.state} | counts


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirections: they could lead to where a webhook must not."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _post(url: str, body: dict[str, Any]) -> str | None:
    """Posts JSON; returns what went wrong, or None if the answer has a status of success."""
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if urllib.parse.urlsplit(url).hostname in LOOPBACK:
        handlers.append(urllib.request.ProxyHandler({}))
    headers = {"Content-Type": "application/json", "User-Agent": "lambda-split"}
    request = urllib.request.Request(url, msgspec.json.encode(body), headers, method="POST")
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=ANSWER_TIMEOUT):
            return None
    except urllib.error.HTTPError as error:
        error.close()
        return f"status {error.code}"
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return type(error).__name__

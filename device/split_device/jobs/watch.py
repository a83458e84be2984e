"""Following a job from another process than the one that runs it."""

from __future__ import annotations

import time
from collections.abc import Callable

from split_common.errors import AgentError, JobsError
from split_device.jobs.agent import running_agent
from split_device.jobs.job import FINAL, Job
from split_device.jobs.store import Store

#: Seconds between two looks into the store.
POLL_INTERVAL = 0.1

#: Seconds without an agent after which nobody waits for it any more.
AGENT_GRACE = 5.0


def follow(store: Store, id_: str, on_text: Callable[[str], None]) -> Job:
    """Passes on what a job generates, from its beginning, until it has ended.

    Raises:
        UnknownJob: there is no such job, or it was removed.
        AgentError: no agent runs that could go on with it.
    """
    seen = 0
    agent_at = time.monotonic()
    while True:
        job = store.get(id_)
        for piece in store.pieces(id_, seen):
            seen += 1
            on_text(piece.text)
        if job.state in FINAL:
            return job
        now = time.monotonic()
        if running_agent() is not None:
            agent_at = now
        elif now - agent_at > AGENT_GRACE:
            raise AgentError(f"job {id_} is {job.state}, and no agent runs: `lambda-split agent start`")
        time.sleep(POLL_INTERVAL)


def answer(store: Store, job: Job) -> str:
    """The text of a job that has succeeded. Raises JobsError for others."""
    if job.state != "succeeded":
        raise JobsError(f"job {job.id} {_said(job)}")
    return store.progress(job.id).text


def _said(job: Job) -> str:
    if job.state == "failed":
        return f"failed: {job.error}"
    return "was cancelled" if job.state == "cancelled" else f"is {job.state}"

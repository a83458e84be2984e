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


def follow(
    store: Store,
    id_: str,
    on_text: Callable[[str], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Job:
    """Passes on what a job generates, from its beginning, until it has ended; of an image how many steps are done.

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
            if on_text is not None:
                on_text(piece.text)
        if on_step is not None:
            on_step(job.steps)
        if job.state in FINAL:
            return job
        now = time.monotonic()
        if running_agent() is not None:
            agent_at = now
        elif now - agent_at > AGENT_GRACE:
            raise AgentError(f"job {id_} is {job.state}, and no agent runs: `lambda-split agent start` starts one")
        time.sleep(POLL_INTERVAL)


def answer(store: Store, job: Job) -> str:
    """The text of a job that has succeeded. Raises JobsError for others."""
    if job.kind != "text":
        raise JobsError(f"job {job.id} makes an image, not a text")
    _check_succeeded(job)
    return store.progress(job.id).text


def picture(store: Store, job: Job) -> bytes:
    """The image of a job that has succeeded, as a PNG file. Raises JobsError for others."""
    if job.kind != "image":
        raise JobsError(f"job {job.id} makes a text, not an image")
    _check_succeeded(job)
    return store.image(job.id)


def _check_succeeded(job: Job) -> None:
    if job.state == "succeeded":
        return
    if job.state == "failed":
        raise JobsError(f"job {job.id} failed: {job.error}")
    raise JobsError(f"job {job.id} {'was' if job.state == 'cancelled' else 'is'} {job.state}")

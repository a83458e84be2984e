"""Follows a job that another process runs, and reads its output."""

from __future__ import annotations

import time
from collections.abc import Callable

from split_common.errors import AgentError, JobsError
from split_device.jobs import waits
from split_device.jobs.agent import running_agent
from split_device.jobs.job import FINAL, PAST, Job
from split_device.jobs.shown import reason, shown_state
from split_device.jobs.store import Store

#: Interval between two reads of the store, in seconds.
POLL_INTERVAL = 0.1

#: How long to wait for an agent to appear, in seconds.
AGENT_GRACE = 5.0


def follow(
    store: Store,
    id_: str,
    on_text: Callable[[str], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    on_notice: Callable[[str], None] = lambda _: None,
) -> Job:
    """Passes on a job's text, or the number of an image's steps done, from the beginning to the end of the job.

    Args:
        on_notice: takes what the agent says while jobs wait for a worker.

    Raises:
        UnknownJob: there is no such job, or it was removed.
        AgentError: no agent runs that could continue the job.
    """
    seen, told = 0, ""
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
            if (notice := waits.said()) not in ("", told):
                on_notice(told := notice)
        elif now - agent_at > AGENT_GRACE:
            words = PAST[shown_state(job)]
            raise AgentError(f"{id_} {words}, and no agent is running: `lambda-split agent start` starts one")
        time.sleep(POLL_INTERVAL)


def text_output(store: Store, job: Job) -> str:
    """The text of a succeeded job. Raises JobsError for any other job."""
    if job.kind != "text":
        raise JobsError(f"{job.id} makes an image, not a text")
    _check_succeeded(job)
    return store.progress(job.id).text


def image_output(store: Store, job: Job) -> bytes:
    """The image of a succeeded job, as a PNG file. Raises JobsError for any other job."""
    if job.kind != "image":
        raise JobsError(f"{job.id} makes a text, not an image")
    _check_succeeded(job)
    return store.image(job.id)


def _check_succeeded(job: Job) -> None:
    if job.state == "succeeded":
        return
    if job.state == "failed":
        raise JobsError(f"{job.id} failed: {reason(job)}")
    raise JobsError(f"{job.id} {PAST[shown_state(job)]}")

"""Follows many jobs at once."""

from __future__ import annotations

import time

import typer

from split_common.errors import AgentError
from split_common.system.console import emit_json, stderr
from split_device.cli.batch_progress import ProgressMode, batch_progress
from split_device.cli.terminal import AgentNotices
from split_device.jobs.agent import running_agent
from split_device.jobs.follow import AGENT_GRACE
from split_device.jobs.job import FINAL, Selection
from split_device.jobs.shown import reason, shown_counts
from split_device.jobs.store import Store

#: Interval between two looks at the jobs, in seconds.
WATCH_INTERVAL = 0.5


def watch_jobs(store: Store, selection: Selection, progress: ProgressMode, json: bool) -> None:
    """Shows how many of the selected jobs have ended, until all have.

    Raises:
        AgentError: no agent runs that could go on.
        Exit: not all have succeeded.
    """
    counts = store.count(selection)
    name = selection.group or "jobs"
    agent_at, notices = time.monotonic(), AgentNotices()
    try:
        with batch_progress(
            "none" if json else progress, name, sum(counts.values()), lambda: store.generated(selection)
        ) as advance:
            while (ended := sum(counts[state] for state in FINAL)) < sum(counts.values()):
                advance(ended, counts["failed"])
                if running_agent() is not None:
                    agent_at = time.monotonic()
                    notices.show()
                elif time.monotonic() - agent_at > AGENT_GRACE:
                    left = sum(counts.values()) - ended
                    waiting = f"{left} job{' is' if left == 1 else 's are'} waiting"
                    raise AgentError(f"{waiting}, and no agent is running: `lambda-split agent start` starts one")
                time.sleep(WATCH_INTERVAL)
                counts = store.count(selection)
            advance(ended, counts["failed"])
    except KeyboardInterrupt:
        stderr.print("the jobs go on: `lambda-split jobs list` shows how far they are")
        raise
    failed = store.ids(Selection(ids=selection.ids, group=selection.group, states=("failed",)))
    if json:
        emit_json({"group": selection.group, "counts": shown_counts(counts), "failed": failed})
    else:
        words = ", ".join(f"{counts[state]} {state}" for state in FINAL if counts[state])
        stderr.print(f"{name}: {words or 'none'}", soft_wrap=True)
        if failed:
            stderr.print(f"the first to fail: {failed[0]}: {reason(store.get(failed[0]))}", soft_wrap=True)
    if counts["succeeded"] < sum(counts.values()):
        raise typer.Exit(1)

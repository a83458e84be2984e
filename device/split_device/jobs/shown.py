"""Jobs as users see them: a running job without an agent is interrupted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from split_common import errors
from split_common.errors import ConfigError, ModelError, PromptTooLong, SplitError, UnsupportedFeature
from split_common.system.times import iso_time
from split_device.jobs.agent import running_agent
from split_device.jobs.job import FINAL, AnyTask, ImageTask, Job, State

#: All states that a user sees, in the order in which a job has them.
SHOWN_STATES = ("queued", "running", "interrupted", "succeeded", "failed", "cancelled")

#: Length of the beginning of a prompt in a list, in characters.
TITLE = 60


def shown_state(job: Job) -> str:
    """A job's state: "interrupted" instead of "running" if no agent runs that could go on with it."""
    return "interrupted" if job.state == "running" and running_agent() is None else job.state


def shown_counts(counts: dict[str, int]) -> dict[str, int]:
    """The number of jobs in each state that users see, from that in each state of the store."""
    alone = running_agent() is None
    running = counts["running"]
    shown = counts | {"running": 0 if alone else running, "interrupted": running if alone else 0}
    return {state: shown[state] for state in SHOWN_STATES}


def stored_states(names: Sequence[str]) -> tuple[State, ...]:
    """The states of the store that these names mean now. Raises ConfigError for a name that is not a state."""
    stored: dict[str, State] = {state: state for state in ("queued", *FINAL)}
    stored["interrupted" if running_agent() is None else "running"] = "running"
    for name in names:
        if name not in SHOWN_STATES:
            raise ConfigError(f"invalid state {name!r}: expected one of {', '.join(SHOWN_STATES)}")
    return tuple(stored[name] for name in names if name in stored)


def title(task: AnyTask, length: int = TITLE) -> str:
    """The first words of what the user asked, on one line."""
    prompt = _token_ids(task) or task.prompt
    if not isinstance(prompt, str):
        prompt = next((message.content for message in reversed(prompt) if message.role == "user"), "")
    # Only the beginning of a long prompt is looked at.
    words = " ".join(prompt[: 10 * length].split())
    return words if len(words) <= length else f"{words[: length - 1].rstrip()}…"


def prompt_of(task: AnyTask) -> str | list[dict[str, str]]:
    """What was asked: a text, or if there is more than a user's message, the messages."""
    if isinstance(task.prompt, str):
        return _token_ids(task) or task.prompt
    if len(task.prompt) == 1 and task.prompt[0].role == "user":
        return task.prompt[0].content
    return [{"role": message.role, "content": message.content} for message in task.prompt]


def _token_ids(task: AnyTask) -> str:
    """A prompt of token ids, as JSON; empty if there is none."""
    if isinstance(task, ImageTask) or isinstance(task.prompt_token_ids, msgspec.UnsetType):
        return ""
    return msgspec.json.encode(task.prompt_token_ids).decode()


def reason(job: Job) -> str:
    """Why a job failed, for people: without the name of the error's class. Empty if it did not fail."""
    error = job.error or ""
    return error.partition(": ")[2] or error if _error_class(error) is not None else error


def may_pass(job: Job) -> bool:
    """Whether a job that failed may succeed when it runs again, though nothing else has changed."""
    cls = _error_class(job.error or "")
    return cls is None or not issubclass(cls, (ConfigError, ModelError, UnsupportedFeature, PromptTooLong))


def _error_class(error: str) -> type[SplitError] | None:
    """The class whose name an error begins with; None for errors that are not lambda-split's own."""
    cls = getattr(errors, error.partition(": ")[0], None)
    return cls if isinstance(cls, type) and issubclass(cls, SplitError) else None


def rate(job: Job) -> float | None:
    """Tokens, or an image's steps, a second since the job began to run the last time; None if it does not run.

    For a job that has ended, until its end.
    """
    if job.claimed is None or job.state == "queued":
        return None
    end = job.finished
    if end is None:
        if shown_state(job) == "interrupted":
            return None
        end = time.time()
    made = job.steps if isinstance(job.task, ImageTask) else job.tokens - job.claimed_tokens
    return made / (end - job.claimed) if end > job.claimed else None


def job_facts(job: Job) -> dict[str, Any]:
    """A job's facts for programs: everything except its prompt and its answer.

    `created`, `started` and `finished`, in seconds since the epoch, are deprecated.
    """
    return {
        "id": job.id,
        "kind": job.kind,
        "state": shown_state(job),
        "cancelling": job.cancelling,
        "priority": job.priority,
        "group": job.group,
        "created": job.created,
        "started": job.started,
        "finished": job.finished,
        "created_at": iso_time(job.created),
        "started_at": iso_time(job.started),
        "finished_at": iso_time(job.finished),
        "model": job.task.model.name,
        "seed": job.task.seed,
        "prompt_tokens": job.prompt_tokens,
        "tokens": job.tokens,
        "steps": job.steps,
        "finish_reason": job.finish_reason,
        "error": job.error,
        "request_id": job.request_id,
        "session": job.session,
    }

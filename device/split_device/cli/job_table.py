"""Jobs as text: a table of many, and all about one."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from typing import Any

import msgspec
from rich.cells import cell_len, set_cell_size

from split_common.models.checkpoint_files import model_name
from split_common.models.split import Layers
from split_device.jobs.hooks import Action
from split_device.jobs.job import ImageTask, Job, Task
from split_device.jobs.shown import job_facts, prompt_of, rate, reason, shown_state, title

#: Units of an age, in seconds.
_UNITS = (("d", 86400), ("h", 3600), ("m", 60))

#: Widest names of groups and models in a table, and narrowest prompts, in columns of a terminal.
NAME_WIDTH = 20
PROMPT_WIDTH = 12


def job_table(jobs: list[Job], width: int) -> Iterator[str]:
    """The lines of a table of jobs. Columns that would say nothing are left out: priority, group and model.

    Args:
        width: that of the terminal.
    """
    columns = {
        "job": [job.id for job in jobs],
        "state": [shown_state(job) for job in jobs],
        "priority": [str(job.priority) for job in jobs],
        "group": [job.group or "" for job in jobs],
        "age": [age(time.time() - job.created) for job in jobs],
        "made": [_made(job) for job in jobs],
        "rate": ["" if (found := rate(job)) is None else f"{found:.1f}/s" for job in jobs],
        "model": [model_name(job.task.model.name).rpartition("/")[2] for job in jobs],
        "prompt": [title(job.task) for job in jobs],
    }
    for name, usual in (("priority", {"0"}), ("group", {""})):
        if set(columns[name]) <= usual:
            del columns[name]
    if len(set(columns["model"])) < 2:
        del columns["model"]
    widths = {name: max(map(cell_len, [name, *cells])) for name, cells in columns.items()}
    for name in ("group", "model"):
        if name in widths:
            widths[name] = min(widths[name], NAME_WIDTH)
    del widths["prompt"]
    widths["prompt"] = max(PROMPT_WIDTH, width - sum(widths.values()) - len(widths))
    for cells in [list(columns), *zip(*columns.values(), strict=True)]:
        yield " ".join(map(_cell, cells, widths.values())).rstrip()


def _cell(text: str, width: int) -> str:
    """A text that takes so many columns of a terminal: cut or filled up."""
    if cell_len(text) > width:
        return f"{set_cell_size(text, width - 1)}…"
    return set_cell_size(text, width)


def age(seconds: float) -> str:
    """A time in its largest unit, as options take it, e.g. `90s`, `12m`, `5h` or `3d`."""
    for unit, length in _UNITS:
        if seconds >= 2 * length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"


def _made(job: Job) -> str:
    if isinstance(job.task, ImageTask):
        return f"{job.steps} of {job.task.settings.steps} steps"
    return f"{job.tokens} tokens"


# --- one job -----------------------------------------------------------------------------------------------


def asked(job: Job) -> dict[str, Any]:
    """What was asked, for programs: the model and its cut, the prompt, and all settings."""
    found: dict[str, Any] = msgspec.to_builtins(job.task)
    del found["type"]
    return found


def job_lines(job: Job, actions: list[Action]) -> Iterator[str]:
    """All about a job except its answer. What does not apply is left out.

    Args:
        actions: what is to happen when it has ended.
    """
    facts = job_facts(job)
    yield f"id: {job.id}"
    # Under the second name, the job stands in the logs of broker and worker.
    yield from _lines({"request id": job.request_id, "session": job.session})
    yield f"kind: {job.kind}"
    yield f"state: {facts['state']}{', will be cancelled soon' if job.ending else ''}"
    yield from _lines({"group": job.group, "priority": job.priority})
    for name, seconds in (("submitted", job.created), ("started", job.started), ("ended", job.finished)):
        if seconds is not None:
            yield f"{name}: {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}"
    yield f"made: {_made(job)}"
    if (found := rate(job)) is not None:
        yield f"rate: {found:.1f} {'tokens' if isinstance(job.task, Task) else 'steps'}/s"
    yield from _lines({"prompt tokens": job.prompt_tokens, "finish reason": job.finish_reason})
    choice = msgspec.to_builtins(job.task.model)
    yield f"model: {choice.pop('name')}"
    if isinstance(job.task, Task):
        # As workers are told it, so that it can be copied.
        yield f"layers: {Layers(choice.pop('head_layers'), -choice.pop('tail_layers') or None)}"
    yield from _lines(choice)
    settings = job.task.sampling if isinstance(job.task, Task) else job.task.settings
    yield from _lines(msgspec.to_builtins(settings))
    if isinstance(job.task, ImageTask) and not isinstance(job.task.init_image, msgspec.UnsetType):
        yield from _lines({"init image": job.task.init_image.path, "strength": job.task.init_image.strength})
    for text in job.task.stop if isinstance(job.task, Task) else ():
        yield f"stop: {text!r}"
    for action in actions:
        yield f"on done: {action.webhook or shlex.join(action.command)}"
    prompt = prompt_of(job.task)
    if isinstance(prompt, str):
        yield f"prompt: {prompt}"
    else:
        yield from (f"{message['role']}: {message['content']}" for message in prompt)
    # Last, because the prompt may be long.
    yield from _lines({"error": reason(job) or None})


def _lines(values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if value is not None:
            yield f"{name.replace('_', ' ')}: {value}"

"""A request for texts, parsed: what all dialects come down to."""

from __future__ import annotations

from dataclasses import dataclass

from split_device.jobs.job import Task


@dataclass(frozen=True)
class Query:
    """A request: one task for each choice of its answer."""

    #: The model's name as the request has it.
    model: str
    #: Those of the first prompt, then those of the second, and so on.
    tasks: tuple[Task, ...]
    stream: bool

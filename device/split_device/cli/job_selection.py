"""Options by which commands choose jobs."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated

import typer

from split_common.errors import ConfigError, UnknownJob
from split_device.cli.options import parse_age
from split_device.jobs.job import STATES, Selection, State
from split_device.jobs.shown import SHOWN_STATES, stored_states
from split_device.jobs.store import Store

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The id that `submit` printed.")]
JobsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[JOB]...", help="The ids that `submit` printed.")
]
StateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--state",
        metavar="STATE",
        help=f"Only jobs in this state: {', '.join(SHOWN_STATES[:-1])} or {SHOWN_STATES[-1]}. May be repeated.",
    ),
]
SinceOption = Annotated[
    str | None,
    typer.Option(
        "--since", metavar="AGE", help="Only jobs that were submitted within this time, e.g. 90s, 30m, 12h or 7d."
    ),
]


def selected(
    store: Store,
    jobs: list[str] | None = None,
    group: str | None = None,
    state: list[str] | None = None,
    since: str | None = None,
) -> Selection:
    """The jobs that options choose: all if none is given.

    Raises:
        ConfigError: a state or an age is invalid.
        UnknownJob: there is no such group.
    """
    selection = Selection(
        ids=tuple(jobs) if jobs else None,
        group=group,
        states=stored_states(state) if state else None,
        since=time.time() - parse_age(since) if since is not None else None,
    )
    if group is not None and not any(store.count(Selection(group=group)).values()):
        raise UnknownJob(f"there is no group {group!r}")
    return selection


def chosen(
    store: Store,
    jobs: list[str] | None,
    group: str | None,
    state: list[str] | None,
    among: tuple[State, ...] = STATES,
) -> list[str]:
    """Ids of the jobs that are named, or else of those that options choose, the oldest first.

    Args:
        among: states of jobs that options may choose.

    Raises:
        ConfigError: no job is chosen, or some are named and options choose others.
        UnknownJob: there is no such group.
    """
    if jobs and (group is not None or state):
        raise ConfigError("name jobs, or choose them by --group and --state, but not both")
    if not jobs and group is None and not state:
        raise ConfigError("which jobs? Name them, or choose them by --group or --state")
    if jobs:
        return list(dict.fromkeys(jobs))
    selection = selected(store, None, group, state)
    states = among if selection.states is None else tuple(set(among) & set(selection.states))
    return store.ids(dataclasses.replace(selection, states=states))

"""Options by which commands choose jobs."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Annotated

import typer

from split_common.cli.groups import Group
from split_common.errors import ConfigError, UnknownJob
from split_device.cli.batches import batches_among
from split_device.cli.options import GroupOption, parse_age
from split_device.jobs.job import STATES, Selection, State
from split_device.jobs.shown import SHOWN_STATES, stored_states
from split_device.jobs.store import Store

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The id that `submit` printed.")]
JobsArgument = Annotated[list[str] | None, typer.Argument(metavar="JOB", help="The ids that `submit` printed.")]
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


@dataclass(frozen=True)
class Choice:
    """The jobs that a command is about: those that are named, or those that options choose."""

    jobs: list[str] | None = None
    group: str | None = None
    state: list[str] | None = None
    since: str | None = None

    @property
    def is_empty(self) -> bool:
        return self == Choice()

    @property
    def batches(self) -> list[str]:
        """The names, if they are those of batches. Raises ConfigError for batches among jobs, or with options."""
        names = batches_among(self.jobs)
        if names and self != Choice(self.jobs):
            raise ConfigError("--group, --state and --since choose jobs, not batches")
        return names

    def selection(self, store: Store, *, default: tuple[State, ...] | None = None) -> Selection:
        """What it chooses, which may be all jobs. Jobs that are named are chosen if the options choose them too.

        Args:
            default: states of the jobs if none is given.

        Raises:
            ConfigError: a state or an age is invalid.
            UnknownJob: there is no such group, or a job that is named.
        """
        for id_ in self.jobs or ():
            store.get(id_)
        if self.group is not None and not any(store.count(Selection(group=self.group)).values()):
            raise UnknownJob(f"there is no group {self.group!r}")
        return Selection(
            ids=tuple(self.jobs) if self.jobs else None,
            group=self.group,
            states=stored_states(self.state) if self.state else default,
            since=time.time() - parse_age(self.since) if self.since is not None else None,
        )

    def ids(self, store: Store, among: tuple[State, ...] = STATES) -> list[str]:
        """Ids of the jobs that are named, or else of those that options choose, the oldest first.

        Args:
            among: states of jobs that options may choose.

        Raises:
            ConfigError: no job is chosen, or some are named and options choose others.
            UnknownJob: there is no such group.
        """
        if self.is_empty:
            raise ConfigError("which jobs? Name them, or choose them by --group, --state or --since")
        if self.jobs:
            if self != Choice(self.jobs):
                raise ConfigError("name jobs, or choose them by --group, --state and --since, but not both")
            return list(dict.fromkeys(self.jobs))
        selection = self.selection(store, default=among)
        states = tuple(state for state in among if state in (selection.states or ()))
        return store.ids(dataclasses.replace(selection, states=states))


CHOICE = Group(jobs=JobsArgument, group=GroupOption, state=StateOption, since=SinceOption)
ChoiceOptions = Annotated[Choice, CHOICE]

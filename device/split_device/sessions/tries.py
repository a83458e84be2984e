"""What the tries of one step have shown: which workers failed or died at it, and which ones are left out."""

from __future__ import annotations

from dataclasses import dataclass, field

from split_common.errors import SessionLost, SplitError, StepFailed, UnknownAdapter, WorkerGone
from split_device.sessions.notices import WorkerWait
from split_device.sessions.session import RemoteSession

#: A step is given up after this many failures of workers at it, or when their deaths count this much. (Workers also
#: die for other reasons.)
MAX_FAILURES = 2
MAX_DEATHS = 4

#: The least that one death counts. The steps that a worker held share the blame, because any of them may be the
#: cause; and workers that die for other reasons often die one after another. A death during the replay counts
#: least, because the replayed steps have run on another worker.
LEAST_DEATH = 0.25


@dataclass
class Blame:
    """Failures and deaths of workers at one step, and how much they count against the step."""

    #: Names of workers that answered that they failed.
    failed: list[str] = field(default_factory=list)
    #: Names of workers that died, by their ids.
    died: dict[bytes, str] = field(default_factory=dict)
    #: How much the deaths count, see `LEAST_DEATH`.
    deaths: float = 0.0

    def note(self, error: SplitError, session: RemoteSession, sent: bool) -> bool:
        """Counts the failure or death of a session's worker. Returns whether another worker has died.

        Args:
            error: ended the attempt.
            session: the session on the worker.
            sent: whether the step itself was sent, and not only the replay.
        """
        if isinstance(error, StepFailed):
            self.failed.append(session.channel.worker_name)
        if not isinstance(error, WorkerGone) or session.worker in self.died:
            return False
        self.died[session.worker] = session.channel.worker_name
        self.deaths += max(LEAST_DEATH, 1 / error.held if sent else 0.0)
        return True

    @property
    def is_enough(self) -> bool:
        """Whether the step must not be tried again."""
        return len(self.failed) >= MAX_FAILURES or self.deaths >= MAX_DEATHS

    @property
    def workers(self) -> list[str]:
        """Names of the workers, one for each failure and death."""
        return [*self.failed, *self.died.values()]


@dataclass
class Tries:
    """What the tries of one step have shown so far."""

    #: The wait for another worker, and what is said of it.
    wait: WorkerWait
    #: When that wait began, by `time.monotonic`; None while there was no failure.
    waiting_since: float | None = None
    blame: Blame = field(default_factory=Blame)
    #: The worker that was left last, unless it may be the only one.
    left: list[bytes] = field(default_factory=list)
    #: Workers that have not loaded the session's adapter, and what they said.
    lacking: dict[bytes, UnknownAdapter] = field(default_factory=dict)
    #: How the session was lost last.
    lost: SessionLost | None = None

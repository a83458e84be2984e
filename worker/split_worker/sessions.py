"""The worker's sessions: whose they are, what they hold, and which request comes next in each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from split_common import wire
from split_common.channel import Channel, SessionKeys
from split_common.errors import Busy, Malformed, OutOfOrder, PromptTooLong
from split_common.tensors import check_finite
from split_worker.body import Body, fork, length, truncate

#: Rows that a worker holds unless told otherwise.
MAX_ROWS = 256

#: Seconds without a request after which a session's memory is freed.
IDLE_TIMEOUT = 900.0

#: Requests of one session that may wait; a device never has more in flight.
MAX_WAITING = 256

#: A session: the device's peer id, and its channel, session and epoch numbers.
SessionId = tuple[bytes, int, int, int]
Frames = tuple[wire.Relay, bytes]


@dataclass
class Session:
    """The KV cache of one generation, and the protocol's state of it."""

    id: SessionId
    keys: SessionKeys
    rows: list[DynamicCache] = field(default_factory=list)
    expected: int = 0
    replies: dict[int, Frames] = field(default_factory=dict)
    used: float = field(default_factory=time.monotonic)

    def admit(self, seq: int) -> Frames | None:
        """Decides what to do with a request: None to run it, its reply if it was answered before.

        Raises:
            OutOfOrder: it is neither the next request nor one whose reply is still kept.
        """
        self.used = time.monotonic()
        if seq == self.expected and self.expected - len(self.replies) < MAX_WAITING:
            self.expected += 1
            return None
        if seq in self.replies:
            return self.replies[seq]
        raise OutOfOrder(f"request {seq} of a session that expects {self.expected}")

    def answered(self, frames: Frames) -> None:
        self.replies[frames[0].seq] = frames

    def forget(self, acked: int) -> None:
        """Drops the replies that the device has."""
        for seq in [seq for seq in self.replies if seq < acked]:
            del self.replies[seq]

    def step(self, body: Body, step: wire.Step, states: torch.Tensor) -> torch.Tensor:
        """Runs a step, `[tokens, width]` to `[tokens, width]`.

        A step that is refused after it has run leaves tokens behind: the next one's `start` cuts them off.

        Raises:
            NonFinite: the output holds NaN or infinity.
            Malformed: rows, positions or width do not fit the session.
            PromptTooLong: a row would exceed the model's positions.
        """
        rows = self._selected(step, body)
        self._check(rows, step, body)
        outputs = []
        parts = torch.split(states, [len(run.positions) for run in step.rows])
        for run, part in zip(step.rows, parts, strict=True):
            row = rows[run.row]
            truncate(row, run.start)
            outputs.append(body.forward(row, part, run.positions))
        output = torch.cat(outputs) if outputs else states
        check_finite(output)
        self.rows = rows
        return output

    def _selected(self, step: wire.Step, body: Body) -> list[DynamicCache]:
        rows = self.rows
        if step.select is not None:
            if any(old >= len(rows) for old in step.select):
                raise Malformed("a step selects a row that the session does not have")
            rows = [fork(rows[old]) for old in step.select]
        wanted = max((run.row + 1 for run in step.rows), default=0)
        return rows + [body.new_row() for _ in range(wanted - len(rows))]

    @staticmethod
    def _check(rows: list[DynamicCache], step: wire.Step, body: Body) -> None:
        if step.width != body.width:
            raise Malformed(f"hidden states of width {step.width}, the model has {body.width}")
        lengths = {index: length(row) for index, row in enumerate(rows)}
        for run in step.rows:
            if run.start > lengths[run.row]:
                raise Malformed(f"a run starts at {run.start}, its row has {lengths[run.row]} tokens")
            lengths[run.row] = run.start + len(run.positions)
            if max(lengths[run.row], max(run.positions) + 1) > body.max_positions:
                raise PromptTooLong(f"a row exceeds the model's {body.max_positions} positions")


class SessionTable:
    """All sessions of a worker, under a limit of rows. Used under the worker's lock."""

    def __init__(self, max_rows: int = MAX_ROWS, idle_timeout: float = IDLE_TIMEOUT) -> None:
        self._sessions: dict[SessionId, Session] = {}
        self._max_rows = max_rows
        self._idle_timeout = idle_timeout

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def room(self) -> int:
        """Rows that are still free; a session without rows yet counts as one."""
        return self._max_rows - sum(max(1, len(session.rows)) for session in self._sessions.values())

    def get(self, id_: SessionId) -> Session | None:
        return self._sessions.get(id_)

    def open(self, id_: SessionId, channel: Channel) -> Session:
        """Raises Busy when the worker is full."""
        self.free_idle()
        if self.room < 1:
            raise Busy(f"the worker holds {self._max_rows} rows", retry_after=1.0)
        session = Session(id_, channel.session_keys(id_[2], id_[3]))
        self._sessions[id_] = session
        return session

    def require_rows(self, session: Session, step: wire.Step) -> None:
        """Raises Busy when a step needs more rows than are free."""
        wanted = len(step.select) if step.select is not None else len(session.rows)
        wanted = max([wanted, *(run.row + 1 for run in step.rows)])
        if wanted - max(1, len(session.rows)) > self.room:
            raise Busy(f"the worker has no room for {wanted} rows", retry_after=1.0)

    def close(self, id_: SessionId) -> None:
        self._sessions.pop(id_, None)

    def close_where(self, condition: Callable[[SessionId], bool]) -> None:
        for id_ in [id_ for id_ in self._sessions if condition(id_)]:
            del self._sessions[id_]

    def free_idle(self) -> None:
        now = time.monotonic()
        self.close_where(lambda id_: now - self._sessions[id_].used > self._idle_timeout)

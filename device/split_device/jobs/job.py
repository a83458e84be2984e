"""What a job is."""

from __future__ import annotations

from typing import Literal

import msgspec

from split_device.settings import Sampling

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FinishReason = Literal["stop", "length"]

#: States that a job leaves only by `retry`.
FINAL: tuple[State, ...] = ("succeeded", "failed", "cancelled")


class ModelChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint and how it is cut; one that is loaded serves all jobs of the same choice."""

    name: str
    revision: str | None = None
    head_layers: int = 2
    tail_layers: int = 2
    dtype: str = "auto"


class Message(msgspec.Struct, frozen=True):
    """A message of a conversation."""

    role: str
    content: str


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be generated. The prompt is a conversation, or a text that is continued as it is."""

    model: ModelChoice
    prompt: tuple[Message, ...] | str
    sampling: Sampling = Sampling()
    #: Texts at which the answer ends; they are no part of it.
    stop: tuple[str, ...] = ()


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job as the store has it. Times are seconds since 1970."""

    id: str
    state: State
    priority: int
    created: float
    started: float | None
    finished: float | None
    #: Whether a running job is to be cancelled.
    cancelling: bool
    task: Task
    prompt_tokens: int | None
    tokens: int
    finish_reason: FinishReason | None
    error: str | None


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Tokens that were generated one after another, and the text that they completed."""

    tokens: list[int]
    text: str


class Progress(msgspec.Struct, frozen=True):
    """How far a job has come: what it takes to go on as if it had never been interrupted."""

    tokens: list[int]
    text: str
    #: State of the random generator after `tokens`; None before the first one.
    sampler: bytes | None


class Update(msgspec.Struct, kw_only=True):
    """What has become of a job since it was written last."""

    id: str
    piece: Piece
    #: State of the random generator after the piece.
    sampler: bytes | None = None
    prompt_tokens: int | None = None
    #: Where the job ends, or "queued" if it is to be run again; None while it runs.
    state: State | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def worth_writing(self) -> bool:
        return bool(self.piece.tokens or self.state or self.prompt_tokens)

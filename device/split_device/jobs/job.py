"""What a job is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import msgspec

from split_common.demo_model import resolve_model
from split_common.split import END_LAYERS
from split_device.diffusion.settings import ImageSettings
from split_device.settings import Sampling

Kind = Literal["text", "image"]
State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FinishReason = Literal["stop", "length"]

#: States that a job leaves only by `retry`.
FINAL: tuple[State, ...] = ("succeeded", "failed", "cancelled")


class ModelChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint and how it is cut; one that is loaded serves all jobs of the same choice."""

    name: str
    revision: str | None = None
    head_layers: int = END_LAYERS
    tail_layers: int = END_LAYERS
    dtype: str = "auto"


def checkpoint(model: str | None) -> str:
    """The name for a `ModelChoice`, valid in whichever process and directory loads it; the demo model's for None.

    Raises:
        ModelError: the demo model is missing and cannot be made.
    """
    name = resolve_model(model)
    return str(Path(name).resolve()) if Path(name).is_dir() else name


class ImageChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The directory of a pipeline, how its denoiser is cut, and how states travel."""

    name: str
    cut: str = "C"
    codec: str = "none"
    reuse: float = 1
    dtype: str = "auto"


class Message(msgspec.Struct, frozen=True):
    """A message of a conversation."""

    role: str
    content: str


class Task(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """What is to be generated. The prompt is a conversation, or a text that is continued as it is."""

    model: ModelChoice
    prompt: tuple[Message, ...] | str
    sampling: Sampling = Sampling()
    #: Texts at which the answer ends; they are no part of it.
    stop: tuple[str, ...] = ()

    @property
    def seed(self) -> int | None:
        return self.sampling.seed

    @property
    def needs_seed(self) -> bool:
        """Whether it would have another output each time."""
        return bool(self.sampling.temperature) and self.seed is None

    def with_seed(self, seed: int | None) -> Task:
        return msgspec.structs.replace(self, sampling=dataclasses.replace(self.sampling, seed=seed))


class ImageTask(msgspec.Struct, frozen=True, kw_only=True, tag="image"):
    """An image that is to be made."""

    model: ImageChoice
    prompt: str
    settings: ImageSettings = ImageSettings()

    @property
    def seed(self) -> int | None:
        return self.settings.seed

    @property
    def needs_seed(self) -> bool:
        """Whether it would have another output each time."""
        return self.seed is None

    def with_seed(self, seed: int | None) -> ImageTask:
        return msgspec.structs.replace(self, settings=dataclasses.replace(self.settings, seed=seed))


AnyTask = Task | ImageTask
AnyChoice = ModelChoice | ImageChoice


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
    task: AnyTask
    prompt_tokens: int | None
    tokens: int
    #: Steps of an image that are done.
    steps: int
    finish_reason: FinishReason | None
    error: str | None

    @property
    def kind(self) -> Kind:
        return kind_of(self.task)


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Tokens that were generated one after another, and the text that they completed."""

    tokens: list[int] = []
    text: str = ""


class Progress(msgspec.Struct, frozen=True):
    """How far a job has come: what it takes to go on as if it had never been interrupted."""

    tokens: list[int]
    text: str
    #: State of the random generator after `tokens`; None before the first one.
    sampler: bytes | None


class Update(msgspec.Struct, kw_only=True):
    """What has become of a job since it was written last."""

    id: str
    piece: Piece = Piece()
    #: State of the random generator after the piece.
    sampler: bytes | None = None
    prompt_tokens: int | None = None
    #: Steps of an image that are done.
    steps: int | None = None
    #: The image, as a PNG file.
    image: bytes | None = None
    #: Where the job ends, or "queued" if it is to be run again; None while it runs.
    state: State | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def worth_writing(self) -> bool:
        return bool(self.piece.tokens or self.state or self.prompt_tokens or self.steps is not None)


def kind_of(task: AnyTask) -> Kind:
    return "image" if isinstance(task, ImageTask) else "text"

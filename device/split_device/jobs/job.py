"""Jobs: their tasks, states, progress and results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec

from split_common.errors import ConfigError
from split_common.models.adapters import parse_adapters
from split_common.models.checkpoint_files import check_config
from split_common.models.demo_model import resolve_model
from split_common.models.split import DEFAULT_CUT, END_LAYERS
from split_common.system.files import user_path
from split_common.system.text import check_text
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.settings import Sampling, may_sample
from split_device.generation.structured import StructuredOutputs
from split_device.generation.token_logprobs import TokenLogprobs
from split_device.generation.tools import ToolCall, ToolCallDelta, ToolUse
from split_device.images.settings import ImageSettings

JobKind = Literal["text", "image"]
State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
JobFinishReason = Literal["stop", "length", "tool_calls"]

#: States that a job leaves only by `retry`.
FINAL: tuple[State, ...] = ("succeeded", "failed", "cancelled")
STATES: tuple[State, ...] = ("queued", "running", *FINAL)

#: How a sentence about a job says its state.
PAST: dict[str, str] = {
    "queued": "is queued",
    "running": "is running",
    "interrupted": "was interrupted",
    "succeeded": "has succeeded",
    "failed": "has failed",
    "cancelled": "was cancelled",
}

#: Longest name of a group, in characters: it stands in a table.
MAX_GROUP = 200


class ModelChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint and how it is cut. Jobs with equal choices share one loaded model."""

    name: str
    revision: str | None = None
    head_layers: int = END_LAYERS
    tail_layers: int = END_LAYERS
    dtype: str = "auto"
    #: Where the tokenizer lies, if not with the weights. Older versions know none.
    tokenizer: str | msgspec.UnsetType = msgspec.UNSET
    #: LoRA adapters as `NAME=DIR`, with absolute directories. A single one is active. Older versions know none.
    adapters: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    #: How hidden states are encoded, if not as they are. Older versions know none.
    codec: str | msgspec.UnsetType = msgspec.UNSET

    @property
    def tokenizer_place(self) -> tuple[str, str | None]:
        """The directory or hub id of the tokenizer, and its revision."""
        return (self.name, self.revision) if self.tokenizer is msgspec.UNSET else (self.tokenizer, None)


def checkpoint(model: str | None) -> str:
    """The name for a `ModelChoice`: absolute for a directory, so that any process can load it.

    Args:
        model: a directory or hub id; None for the demo model.

    Raises:
        ModelError: the demo model is missing and cannot be made, or the directory's config.json is malformed.
        ConfigError: the directory's path is not UTF-8, which tokenizers cannot read.
    """
    name = resolve_model(model)
    directory = user_path(name)
    check_config(name)
    return check_text(str(directory.resolve()) if directory.exists() else name, "the model's path")


def adapter_choices(given: Iterable[str]) -> tuple[str, ...]:
    """Adapters for a `ModelChoice`, of options like `NAME=DIR` or `DIR`. Raises what `parse_adapters` raises."""
    found = parse_adapters(given).items()
    return tuple(check_text(f"{name}={path.resolve()}", "the adapter's path") for name, path in found)


class ImageChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The directory of a pipeline, how its denoiser is cut, and how hidden states are encoded."""

    name: str
    cut: str = DEFAULT_CUT
    codec: str = "none"
    reuse: float = 1
    dtype: str = "auto"


class MessageImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image in a message: a file and the SHA-256 of its content in hex, or the content itself."""

    #: How many characters of the message's text come before it.
    at: int
    path: str | msgspec.UnsetType = msgspec.UNSET
    sha256: str | msgspec.UnsetType = msgspec.UNSET
    data: bytes | msgspec.UnsetType = msgspec.UNSET


class Message(msgspec.Struct, frozen=True):
    """A message of a conversation. Older versions know its role and content alone."""

    role: str
    content: str
    #: Of an assistant: the tools that it called, and what it thought before it answered.
    tool_calls: tuple[ToolCall, ...] | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    #: Of a tool's answer: the id of the call that it answers.
    tool_call_id: str | msgspec.UnsetType = msgspec.UNSET
    #: Images that the model is shown, in order. Older versions know none.
    images: tuple[MessageImage, ...] | msgspec.UnsetType = msgspec.UNSET


class Task(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """A text to generate. The prompt is a conversation, or a text that is continued as it is."""

    model: ModelChoice
    prompt: tuple[Message, ...] | str
    sampling: Sampling = Sampling()
    #: Texts at which the answer ends; they are not part of it.
    stop: tuple[str, ...] = ()
    #: How a conversation becomes a prompt. Older versions know none.
    chat_template: ChatTemplate | msgspec.UnsetType = msgspec.UNSET
    #: The prompt as token ids, which is sent as it is; `prompt` is then empty. Older versions know none.
    prompt_token_ids: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET
    #: Whether the answer continues the conversation's last message. Older versions answer it.
    continue_final_message: bool | msgspec.UnsetType = msgspec.UNSET
    #: What the answer has to look like. Older versions know none, nor tools.
    structured: StructuredOutputs | msgspec.UnsetType = msgspec.UNSET
    tool_use: ToolUse | msgspec.UnsetType = msgspec.UNSET
    #: How many alternatives are told with the log probability of each token, and of each token of the prompt. Older
    #: versions tell none.
    logprobs: int | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: int | msgspec.UnsetType = msgspec.UNSET
    #: Whether the answer is told with its prompt. Older versions know none.
    echo: bool | msgspec.UnsetType = msgspec.UNSET

    @property
    def template(self) -> ChatTemplate:
        return ChatTemplate() if self.chat_template is msgspec.UNSET else self.chat_template

    @property
    def continues(self) -> bool:
        """Whether the answer goes on where the prompt of a conversation ends."""
        return self.continue_final_message is True

    @property
    def seed(self) -> int | None:
        return self.sampling.seed

    @property
    def needs_seed(self) -> bool:
        """Whether the output might differ from run to run unless a seed is drawn."""
        sampling = self.sampling
        if self.seed is not None or sampling.greedy:
            return False
        return sampling.temperature is not None or sampling.asks_for_sampling or may_sample(self.model.name)

    def with_seed(self, seed: int | None) -> Task:
        return msgspec.structs.replace(self, sampling=dataclasses.replace(self.sampling, seed=seed))


class InitImage(msgspec.Struct, frozen=True, kw_only=True):
    """The image that an image begins with: a file, the SHA-256 of its content in hex, and how much is to change."""

    path: str
    sha256: str
    strength: float


class ImageTask(msgspec.Struct, frozen=True, kw_only=True, tag="image"):
    """An image to generate."""

    model: ImageChoice
    prompt: str
    settings: ImageSettings = ImageSettings()
    init_image: InitImage | msgspec.UnsetType = msgspec.UNSET

    @property
    def seed(self) -> int | None:
        return self.settings.seed

    @property
    def needs_seed(self) -> bool:
        """Whether the output would differ from run to run unless a seed is drawn."""
        return self.seed is None

    def with_seed(self, seed: int | None) -> ImageTask:
        return msgspec.structs.replace(self, settings=dataclasses.replace(self.settings, seed=seed))


AnyTask = Task | ImageTask
AnyChoice = ModelChoice | ImageChoice


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job as stored. Times are in seconds since the epoch."""

    id: str
    state: State
    priority: int
    created: float
    started: float | None
    finished: float | None
    #: Whether a user has cancelled the running job.
    cancelling: bool
    task: AnyTask
    prompt_tokens: int | None
    tokens: int
    #: Number of denoising steps done so far.
    steps: int
    finish_reason: JobFinishReason | None
    error: str | None
    #: Name of the group that it belongs to.
    group: str | None = None
    #: When the job began to run the last time, and how many tokens it had then.
    claimed: float | None = None
    claimed_tokens: int = 0
    #: The id by which logs name its request: its own id unless another one was given.
    request_id: str = ""
    #: By which broker and worker name its last session: the first 8 hexadecimal digits of the session's key.
    session: str | None = None

    @property
    def kind(self) -> JobKind:
        return kind_of(self.task)

    @property
    def ending(self) -> bool:
        """Whether a user has cancelled the job, and it still runs."""
        return self.cancelling and self.state == "running"


class TextPiece(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive generated tokens, and the text that they completed."""

    tokens: list[int] = []
    text: str = ""


class AnswerTextPiece(TextPiece, frozen=True, array_like=True):
    """A piece in which something was thought, or a tool was called. Older versions know its text alone."""

    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class ScoredTextPiece(AnswerTextPiece, frozen=True, array_like=True):
    """A piece with log probabilities, or the first one of an answer with its prompt. Older versions ignore both."""

    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt: str = ""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class JobProgress(msgspec.Struct, frozen=True):
    """The state from which a job continues as if it had never been interrupted."""

    tokens: list[int]
    text: str
    #: State of the random generator after `tokens`; None before the first one.
    sampler: bytes | None
    #: What the model thought before it answered, and the tools that it called.
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    #: Log probabilities, if they were asked for, and the prompt's text if that was.
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt: str = ""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Update(msgspec.Struct, kw_only=True):
    """The changes of a job since it was last written."""

    id: str
    piece: TextPiece = TextPiece()
    #: State of the random generator after the piece.
    sampler: bytes | None = None
    prompt_tokens: int | None = None
    #: Number of denoising steps done so far.
    steps: int | None = None
    #: The image, as a PNG file.
    image: bytes | None = None
    #: The final state, or "queued" to run the job again; None while it runs.
    state: State | None = None
    finish_reason: JobFinishReason | None = None
    error: str | None = None
    #: By which broker and worker name its session, if it has a new one.
    session: str | None = None

    @property
    def worth_writing(self) -> bool:
        return bool(self.piece.tokens or self.state or self.prompt_tokens or self.steps is not None or self.session)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Some of a store's jobs. A field that is None restricts nothing."""

    ids: tuple[str, ...] | None = None
    states: tuple[State, ...] | None = None
    #: Name of a group. No job belongs to a group that does not exist.
    group: str | None = None
    #: Only jobs that were submitted then or later, in seconds since the epoch.
    since: float | None = None


def check_group(name: str) -> str:
    """Returns the name of a group. Raises ConfigError if it is empty, too long, or not one line of text."""
    check_text(name, "the group's name")
    if not name.strip() or len(name) > MAX_GROUP or not name.isprintable():
        raise ConfigError(f"invalid group {name!r}: expected 1 to {MAX_GROUP} printable characters")
    return name


def kind_of(task: AnyTask) -> JobKind:
    return "image" if isinstance(task, ImageTask) else "text"

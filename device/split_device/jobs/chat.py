"""One answer at a time, as it comes: what `generate` and `chat` do."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from split_device.generation.answers import AnswerStream
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.generator import Logprobs
from split_device.generation.settings import Sampling
from split_device.generation.structured import StructuredOutputs
from split_device.generation.tool_calls import AnswerPiece
from split_device.jobs.job import JobProgress, Message, MessageImage, ModelChoice, Task
from split_device.jobs.models import Loaded
from split_device.sessions.identity import new_request_id


@dataclass(frozen=True)
class ChatAnswer:
    """A generated text. Times in seconds; the first token's includes the prompt's prefill."""

    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: str
    first_token_seconds: float
    seconds: float
    #: The id by which logs name the request, which all turns of a conversation share, and the name that broker and
    #: worker log: the first 8 hexadecimal digits of the session's key.
    request_id: str = ""
    session: str = ""
    #: What the model thought before it answered.
    reasoning: str = ""
    #: Tokens of the prompt that were not computed again.
    cached_tokens: int = 0
    #: Tokens that were drafted, and how many of them were right.
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed. The first token, which waits for the prompt, does not count."""
        return (self.tokens - 1) / (self.seconds - self.first_token_seconds) if self.tokens > 1 else 0.0


def _nothing(_text: str = "") -> None:
    pass


class _Shown:
    """An answer that is passed on as soon as text is complete."""

    def __init__(
        self, stream: AnswerStream, on_text: Callable[[str], None], on_thinking: Callable[[str], None]
    ) -> None:
        self._stream, self._on_text, self._on_thinking = stream, on_text, on_thinking
        self.text = self.reasoning = ""
        self.tokens = 0

    def push(self, token: int) -> bool:
        """Adds a token. Returns whether a stop string has come."""
        self.tokens += 1
        self._pass_on(self._stream.push(token))
        return self._stream.stopped

    def end(self) -> None:
        self._pass_on(self._stream.end())

    def _pass_on(self, piece: AnswerPiece) -> None:
        if piece.reasoning:
            self.reasoning += piece.reasoning
            self._on_thinking(piece.reasoning)
        if piece.text:
            self.text += piece.text
            self._on_text(piece.text)


def answer(
    loaded: Loaded,
    task: Task,
    prompt: list[int] | None = None,
    on_text: Callable[[str], None] = _nothing,
    on_thinking: Callable[[str], None] = _nothing,
    on_token: Callable[[], None] = _nothing,
    request_id: str | None = None,
) -> ChatAnswer:
    """Answers a task. An exception on the way, such as Ctrl-C, cancels it.

    Args:
        prompt: what `prompt_tokens` returned for the task; None to encode it now.
        on_text, on_thinking: get the answer, and what the model thinks before it, as soon as they come.
        on_token: called on the generator's thread for each token, before the next step begins.
        request_id: the id by which logs name it; None for a random one.

    Raises:
        PromptTooLong: the tokens fill the model's positions, or the device's memory.
        ConfigError: the chat template refuses the conversation; or a setting is out of bounds, or names a token
            that the model does not have.
        UnsupportedFeature: what the answer has to look like is refused, or the model's kind of images.
        SplitError: no worker could answer.
    """
    prompt = loaded.encode(task) if prompt is None else loaded.fitting(prompt)
    request = loaded.request(task, JobProgress([], "", None), 0, prompt)
    shown = _Shown(loaded.answer(task, prompt), on_text, on_thinking)
    first_token: list[float] = []

    def note(_token: int, _logprobs: Logprobs | None, _sampler: bytes | None) -> None:
        if not first_token:
            first_token.append(time.perf_counter())
        on_token()

    began = time.perf_counter()
    generation = loaded.generator.submit(dataclasses.replace(request, request_id=request_id), note)
    try:
        stopped = any(map(shown.push, generation))
        now = time.perf_counter()
    finally:
        generation.cancel()
    shown.end()
    return ChatAnswer(
        text=shown.text,
        prompt_tokens=len(prompt),
        tokens=shown.tokens,
        finish_reason="stop" if stopped else str(generation.finish_reason),
        first_token_seconds=(first_token[0] if first_token else now) - began,
        seconds=now - began,
        request_id=generation.request_id,
        session=generation.session or "",
        reasoning=shown.reasoning,
        cached_tokens=generation.cached_tokens,
        drafted_tokens=generation.drafted_tokens,
        accepted_tokens=generation.accepted_tokens,
    )


class Conversation:
    """A conversation, each of whose turns sends only what is new. Not thread-safe.

    Args:
        loaded: a model with a generator that keeps what its requests leave behind.
        choice: the model's, which tasks name.
        start: messages before the first turn, e.g. a system message.
        template: another chat template, or values for its variables.
        request_id: the id by which logs name it; None for a random one.
    """

    def __init__(
        self,
        loaded: Loaded,
        choice: ModelChoice,
        start: Sequence[Message] = (),
        template: ChatTemplate = ChatTemplate(),
        request_id: str | None = None,
    ) -> None:
        self._loaded = loaded
        self._choice = choice
        self._template = template
        self._start = tuple(start)
        self._request_id = request_id or new_request_id()
        self.reset()

    def reset(self) -> None:
        """Forgets all turns."""
        self.messages: tuple[Message, ...] = self._start

    def say(
        self,
        text: str,
        sampling: Sampling,
        on_text: Callable[[str], None] = _nothing,
        stop: Sequence[str] = (),
        images: Sequence[MessageImage] = (),
        structured: StructuredOutputs | None = None,
        on_thinking: Callable[[str], None] = _nothing,
    ) -> ChatAnswer:
        """Answers the user, up to a text in `stop`. If it fails, the turn is forgotten.

        What the model thinks is not part of the text: `on_thinking` gets it. `images` are shown before the text.
        From then on, each turn sends all earlier ones again. The answer looks as `structured` says.

        Raises:
            SplitError: as `answer`.
        """
        asked = Message("user", text, images=tuple(images) or msgspec.UNSET)
        task = Task(
            model=self._choice,
            prompt=(*self.messages, asked),
            sampling=sampling,
            stop=tuple(stop),
            chat_template=self._template.unless_default(),
            structured=structured or msgspec.UNSET,
        )
        said = answer(self._loaded, task, None, on_text, on_thinking, request_id=self._request_id)
        answered = Message("assistant", said.text, reasoning=said.reasoning or msgspec.UNSET)
        # At once, so that Ctrl-C leaves all of the turn or nothing.
        self.messages = (*self.messages, asked, answered)
        return said

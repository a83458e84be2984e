"""Running jobs: how each kind starts, is interrupted, and ends."""

from __future__ import annotations

import dataclasses
import queue
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from split_common.errors import ConfigError
from split_device.generation.generator import Generation, Logprobs
from split_device.generation.token_logprobs import LogprobsWriter, TokenLogprobs, prompt_logprobs
from split_device.generation.tool_calls import AnswerPiece
from split_device.images.files import file_digest, image_bytes, read_image
from split_device.jobs.job import (
    AnswerTextPiece,
    ImageTask,
    InitImage,
    Job,
    JobFinishReason,
    JobProgress,
    ScoredTextPiece,
    Task,
    TextPiece,
    Update,
)
from split_device.jobs.models import Loaded

if TYPE_CHECKING:
    from split_device.images.pipeline import ImagePipeline


class JobExecution:
    """A running job. `update` holds what is not written yet."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.update = Update(id=job.id)
        #: Whether a user has cancelled the job.
        self.cancelled = False
        self._session: str | None = None

    def _note_session(self, session: str | None) -> None:
        """Puts what broker and worker call its session into `update`, if that is new."""
        if session is not None and session != self._session:
            self._session = self.update.session = session

    @property
    def done(self) -> bool:
        raise NotImplementedError

    def cancel(self) -> None:
        """Interrupts the job, which ends soon afterwards."""
        raise NotImplementedError

    def collect(self) -> bool:
        """Moves new output into `update`; returns whether there was any."""
        raise NotImplementedError

    def conclude(self) -> BaseException | None:
        """Puts the end of the job into `update`, or returns the error with which it failed."""
        raise NotImplementedError

    def record_interruption(self) -> None:
        """Puts an interruption into `update`: the job runs again, unless a user cancelled it."""
        self.update.state = "cancelled" if self.cancelled else "queued"


class TextExecution(JobExecution):
    """A generation, which continues where it stopped.

    Raises:
        PromptTooLong: the prompt leaves no room for an answer.
        ConfigError: the chat template or a setting is refused.
    """

    def __init__(self, job: Job, task: Task, loaded: Loaded, progress: JobProgress) -> None:
        super().__init__(job)
        request = dataclasses.replace(loaded.request(task, progress, job.priority), request_id=job.request_id)
        if progress.tokens:
            # Those of the prompt came with the first token.
            request = dataclasses.replace(request, prompt_logprobs=None)
        self.update.prompt_tokens = len(request.prompt)
        self._tokenizer, self._echo = loaded.tokenizer, task.echo is True
        #: Whether the first piece is stored, which tells of the prompt.
        self._begun = bool(progress.tokens)
        self._logprobs = LogprobsWriter(loaded.tokenizer, progress.tokens[-1] if progress.tokens else None)
        self._answer = loaded.answer(task, request.prompt, job.id)
        for token in progress.tokens:
            self._answer.push(token)
        #: Filled by the generator's thread: a token, its log probabilities, and the state of the random generator
        #: after it.
        self._tokens: queue.SimpleQueue[tuple[int, Logprobs | None, bytes | None]] = queue.SimpleQueue()
        self._generation: Generation | None = None
        #: Set if the process was killed between the last token and the end of the job.
        self._reason: JobFinishReason | None = None
        if self._answer.stopped or (
            progress.tokens and progress.tokens[-1] in task.sampling.ends(loaded.end_tokens)
        ):
            self._reason = "stop"
        elif len(progress.tokens) >= request.config.max_new_tokens:
            self._reason = "length"
        else:
            self._generation = loaded.generator.submit(
                request, lambda token, logprobs, sampler: self._tokens.put((token, logprobs, sampler))
            )

    @property
    def done(self) -> bool:
        return self._generation is None or self._generation.done

    def cancel(self) -> None:
        if self._generation is not None:
            self._generation.cancel()

    def collect(self) -> bool:
        if self._generation is not None:
            self._note_session(self._generation.session)
        arrived = not self._tokens.empty()
        while not self._tokens.empty():
            token, logprobs, sampler = self._tokens.get()
            if not self._answer.stopped:
                if not self._begun:
                    self._begin_piece()
                scored = () if logprobs is None else (self._logprobs.next(token, logprobs),)
                self._add([token], self._answer.push(token), scored)
                self.update.sampler = sampler
        if self._answer.stopped and not self.done:
            self.cancel()
        return arrived

    def conclude(self) -> BaseException | None:
        generation = self._generation
        if generation is None:
            self._succeed(self._reason or "stop")
        elif self._answer.stopped or generation.finish_reason == "stop":
            self._succeed("stop")
        elif generation.error is not None:
            return generation.error
        elif generation.finish_reason == "length":
            self._succeed("length")
        else:
            self.record_interruption()
        return None

    def _succeed(self, reason: JobFinishReason) -> None:
        self._add([], self._answer.end())
        called = reason == "stop" and self._answer.called
        self.update.state, self.update.finish_reason = "succeeded", "tool_calls" if called else reason

    def _add(self, tokens: list[int], piece: AnswerPiece, logprobs: tuple[TokenLogprobs, ...] = ()) -> None:
        known = ScoredTextPiece(*msgspec.structs.astuple(self.update.piece))
        grown = msgspec.structs.replace(
            known,
            tokens=[*known.tokens, *tokens],
            text=known.text + piece.text,
            reasoning=known.reasoning + piece.reasoning,
            calls=(*known.calls, *piece.calls),
            logprobs=(*known.logprobs, *logprobs),
        )
        self.update.piece = _plainest(grown)

    def _begin_piece(self) -> None:
        """Puts what is told of the prompt into `update`: with the first token, the prompt has been scored."""
        generation, self._begun = self._generation, True
        assert generation is not None
        asked = generation.request
        text = self._tokenizer.decode(asked.prompt, skip_special_tokens=True) if self._echo else ""
        scores = (
            prompt_logprobs(self._tokenizer, asked.prompt, generation.prompt_logprobs)
            if asked.prompt_logprobs is not None
            else ()
        )
        self.update.piece = _plainest(ScoredTextPiece(prompt=text, prompt_logprobs=tuple(scores)))


def _plainest(piece: ScoredTextPiece) -> TextPiece:
    """A piece without empty fields at its end, as older versions store it."""
    if piece.logprobs or piece.prompt or piece.prompt_logprobs:
        return piece
    if piece.reasoning or piece.calls:
        return AnswerTextPiece(piece.tokens, piece.text, piece.reasoning, piece.calls)
    return TextPiece(piece.tokens, piece.text)


class ImageExecution(JobExecution):
    """An image. It starts over whenever its job runs; the seed makes the results equal.

    Raises:
        ConfigError: its initial image cannot be read, or is not what it was.
    """

    def __init__(self, job: Job, task: ImageTask, pipeline: ImagePipeline) -> None:
        super().__init__(job)
        self._steps = self.update.steps = 0
        self._generation = pipeline.start(task.prompt, task.settings, job.request_id, **_beginning(task.init_image))

    @property
    def done(self) -> bool:
        return self._generation.done

    def cancel(self) -> None:
        self._generation.cancel()

    def collect(self) -> bool:
        self._note_session(self._generation.session)
        if self._generation.steps == self._steps:
            return False
        self._steps = self.update.steps = self._generation.steps
        return True

    def conclude(self) -> BaseException | None:
        error = self._generation.future.exception()
        if error is not None and self._generation.cancelled:
            self.record_interruption()
            return None
        if error is None:
            self.update.image = image_bytes(self._generation.future.result())
            self.update.state = "succeeded"
        return error


def _beginning(init: InitImage | msgspec.UnsetType) -> dict[str, Any]:
    """Arguments of a pipeline that begins with an image; none without one. Raises ConfigError."""
    if isinstance(init, msgspec.UnsetType):
        return {}
    path = Path(init.path)
    if file_digest(path) != init.sha256:
        raise ConfigError(f"{path} has changed since the job was submitted: submit it again")
    return {"image": read_image(path), "strength": init.strength}

"""Running jobs: how each kind starts, is interrupted, and ends."""

from __future__ import annotations

import dataclasses
import queue
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from split_common.errors import ConfigError
from split_device.generation.generator import Generation
from split_device.generation.tool_calls import AnswerPiece
from split_device.images.files import file_digest, image_bytes, read_image
from split_device.jobs.job import (
    AnswerTextPiece,
    ImageTask,
    InitImage,
    Job,
    JobFinishReason,
    JobProgress,
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
        self.update.prompt_tokens = len(request.prompt)
        self._answer = loaded.answer(task, request.prompt, job.id)
        for token in progress.tokens:
            self._answer.push(token)
        #: Filled by the generator's thread: a token, and the state of the random generator after it.
        self._tokens: queue.SimpleQueue[tuple[int, bytes | None]] = queue.SimpleQueue()
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
                request, lambda token, _logprobs, sampler: self._tokens.put((token, sampler))
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
            token, sampler = self._tokens.get()
            if not self._answer.stopped:
                self._add([token], self._answer.push(token))
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

    def _add(self, tokens: list[int], piece: AnswerPiece) -> None:
        written = self.update.piece
        tokens, text = [*written.tokens, *tokens], written.text + piece.text
        known = written if isinstance(written, AnswerTextPiece) else AnswerTextPiece()
        reasoning, calls = known.reasoning + piece.reasoning, (*known.calls, *piece.calls)
        self.update.piece = (
            AnswerTextPiece(tokens, text, reasoning, calls) if reasoning or calls else TextPiece(tokens, text)
        )


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

"""A diffusers pipeline around a split denoiser: generates several images at once, each in its own thread."""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from transformers import PreTrainedTokenizerBase

from split_common.errors import ConfigError, ModelError, SplitError
from split_common.models.checkpoint_files import check_pipeline_files
from split_device.generation.settings import SEED_BOUND
from split_device.images.notices import add_notices, describe
from split_device.images.settings import ImageSettings, check_size
from split_device.models.denoiser import SplitDenoiser
from split_device.sessions.identity import check_request_id, new_request_id
from split_device.sessions.notices import OnNotice

#: Called on the image's thread with the number of steps done and the total.
OnStep = Callable[[int, int], None]


class Cancelled(Exception):
    """The image was cancelled."""


class ImageGeneration:
    """An image in progress. Its methods may be called from any thread."""

    def __init__(self, make: Callable[[ImageGeneration], Any]) -> None:
        #: The Pillow image, or the error: `Cancelled` after `cancel`.
        self.future: Future[Any] = Future()
        # Only `cancel` ends the image; cancelling the future does not.
        self.future.set_running_or_notify_cancel()
        #: Number of steps done so far.
        self.steps = 0
        #: By which broker and worker name its session: the first 8 hexadecimal digits of the session's key. None
        #: before it begins.
        self.session: str | None = None
        self._interrupt: Callable[[], None] | None = None
        #: Whether `cancel` was called.
        self.cancelled = False
        # Not a daemon thread: torch crashes if the interpreter exits under it. The caller cancels the image.
        threading.Thread(target=self._run, args=(make,), name="image-generation").start()

    @property
    def done(self) -> bool:
        return self.future.done()

    def cancel(self) -> None:
        """Ends the image after its current step, which stops waiting for a worker."""
        self.cancelled = True
        if (interrupt := self._interrupt) is not None:
            interrupt()

    def check(self) -> None:
        """Raises Cancelled if the image was cancelled."""
        if self.cancelled:
            raise Cancelled

    def interrupt_with(self, interrupt: Callable[[], None]) -> None:
        """Sets what interrupts a step that waits for a worker. Raises Cancelled if the image was cancelled."""
        self._interrupt = interrupt
        self.check()

    def _run(self, make: Callable[[ImageGeneration], Any]) -> None:
        try:
            image = make(self)
        except BaseException as error:
            self.future.set_exception(Cancelled() if self.cancelled else error)
        else:
            self.future.set_result(image)


class ImagePipeline:
    """Generates images with one model.

    Args:
        directory: the pipeline's directory.
        denoiser: the split denoiser of the pipeline. The caller closes it.
        at_once: the number of images generated at once; further ones wait.

    Raises:
        ModelError: the pipeline cannot be loaded.
    """

    def __init__(self, directory: str, denoiser: SplitDenoiser, *, at_once: int = 1) -> None:
        self.denoiser = denoiser
        self._directory = directory
        #: Copies of the pipeline that are not in use.
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        pipeline = _load(directory, denoiser)
        module: Any = denoiser
        if module.device.type != "cpu":
            pipeline.to(module.device)
        for _ in range(at_once):
            self._idle.put(_private_copy(pipeline))

    def check(self, settings: ImageSettings) -> None:
        """Raises ConfigError for settings with which the model cannot make an image."""
        check_size(self._directory, settings.checked())

    def start(
        self,
        prompt: str,
        settings: ImageSettings,
        request_id: str | None = None,
        index: int = 0,
        on_notice: OnNotice | None = None,
        **more: Any,
    ) -> ImageGeneration:
        """Starts an image in its own thread.

        Args:
            request_id: the id by which logs name it, 1 to 128 visible ASCII characters; None for a random one.
            index: which of the images of one request id it is, from 0.
            on_notice: takes one line of text when its worker is lost, waited for or found. Called on any thread,
                beside the connection's `on_notice`.
            more: further arguments of the pipeline, as for `generate`.

        Raises:
            ConfigError: the model cannot make an image with these settings, or the request id is not one.
            ForkedProcess: this process was forked since the model was loaded.
        """
        self.denoiser.check_process()
        self.check(settings)
        settings = settings.checked()
        id_ = new_request_id() if request_id is None else check_request_id(request_id)

        def make(generation: ImageGeneration) -> Any:
            with self._borrowed() as pipeline:
                session = self.denoiser.begin(id_, index, on_notice)
                generation.session = session.identity.label
                generation.interrupt_with(session.abandon)

                def advance(steps: int, _total: int) -> None:
                    generation.check()
                    generation.steps = steps

                return _generate(pipeline, prompt, settings, advance, **more)

        return ImageGeneration(make)

    def generate(self, prompt: str, settings: ImageSettings, on_step: OnStep | None = None, **more: Any) -> Any:
        """Generates an image on the calling thread; returns it as a Pillow image, with settings and notes.

        Args:
            more: further arguments of the pipeline. `image` makes it begin with that image.

        Raises:
            ConfigError: the pipeline refuses an argument.
            SplitError: the worker or the queue failed, or the model cannot be split in this way.
        """
        self.denoiser.check_process()
        settings = settings.checked()
        with self._borrowed() as pipeline:
            return _generate(pipeline, prompt, settings, on_step, **more)

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[Any]:
        """Borrows a copy of the pipeline, waiting for one if all are in use."""
        pipeline = self._idle.get()
        try:
            yield pipeline
        finally:
            self._idle.put(pipeline)


def _generate(pipeline: Any, prompt: str, settings: ImageSettings, on_step: OnStep | None, **more: Any) -> Any:
    def advance(used: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1, getattr(used, "num_timesteps", settings.steps))
        return values

    if "image" in more:
        pipeline = _image_to_image(pipeline)
    options = settings.options() | more
    if settings.seed is not None:
        options["generator"] = torch.Generator().manual_seed(settings.seed % SEED_BOUND)
    with _refused_input():
        output = pipeline(prompt, callback_on_step_end=advance, **options)
    image = output.images[0]
    describe(image, pipeline, prompt, settings, more)
    add_notices(image, pipeline, output, prompt, settings)
    return image


def _image_to_image(pipeline: Any) -> Any:
    """A pipeline of the same parts that begins with an image. Raises ConfigError if the model has none."""
    from diffusers import AutoPipelineForImage2Image

    with _refused_input():
        found = AutoPipelineForImage2Image.from_pipe(pipeline)
    found.set_progress_bar_config(disable=True)
    return found


def _private_copy(pipeline: Any) -> Any:
    """A copy that shares the weights, and has its own copy of each component that changes during a call."""
    private = copy.copy(pipeline)
    for name, part in pipeline.components.items():
        # A tokenizer stores its padding; a half-precision VAE may be upcast for decoding, and cast back.
        changes = isinstance(part, SchedulerMixin | PreTrainedTokenizerBase)
        if changes or (name == "vae" and part.dtype == torch.float16 and part.config.force_upcast):
            setattr(private, name, copy.deepcopy(part))
    return private


def _load(directory: str, denoiser: SplitDenoiser) -> Any:
    """The checkpoint's own pipeline with the split denoiser. Its code is not run, nor its pickles read.

    Raises:
        ModelError: it cannot be loaded.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    check_pipeline_files(Path(directory))
    try:
        pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(
            directory,
            **denoiser.pipeline_options(),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except SplitError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"the pipeline in {directory} cannot be loaded: {reason[0]}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def _refused_input() -> Iterator[None]:
    """Raises ConfigError instead of the ValueError with which a pipeline refuses its arguments."""
    try:
        yield
    except SplitError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None

"""A pipeline of diffusers whose denoiser is split: makes images, several at once, each in a thread of its own."""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch
from diffusers import SchedulerMixin
from transformers import PreTrainedTokenizerBase

from split_common.errors import ConfigError, ModelError, SplitError
from split_device.diffusion.denoiser import SplitDenoiser
from split_device.diffusion.settings import ImageSettings, check_size

#: Seeds of torch's generator are taken modulo this.
_SEEDS = 2**64

#: Is told, in the thread that makes the image, how many steps are done, and how many there are.
OnStep = Callable[[int, int], None]


class Cancelled(Exception):
    """Nobody wants the image any more."""


class Painting:
    """An image under way. All methods may be called in any thread."""

    def __init__(self, make: Callable[[Painting], Any]) -> None:
        #: Has Pillow's image, or what it failed with; `Cancelled` once it was cancelled.
        self.future: Future[Any] = Future()
        # It is `cancel` that ends it: whoever waits for the future may stop doing so.
        self.future.set_running_or_notify_cancel()
        #: Steps that are done.
        self.steps = 0
        self._abandon: Callable[[], None] | None = None
        #: Whether `cancel` was called.
        self.cancelled = False
        # No daemon: torch does not bear it when the interpreter ends under it. Whoever starts one cancels it.
        threading.Thread(target=self._run, args=(make,), name="painting").start()

    @property
    def done(self) -> bool:
        return self.future.done()

    def cancel(self) -> None:
        """Ends it soon: after the step under way, which does not wait for a worker any more."""
        self.cancelled = True
        if (abandon := self._abandon) is not None:
            abandon()

    def check(self) -> None:
        """Raises Cancelled."""
        if self.cancelled:
            raise Cancelled

    def holds(self, abandon: Callable[[], None]) -> None:
        """What makes a step that waits for a worker fail soon. Raises Cancelled."""
        self._abandon = abandon
        self.check()

    def _run(self, make: Callable[[Painting], Any]) -> None:
        try:
            image = make(self)
        except BaseException as error:
            self.future.set_exception(Cancelled() if self.cancelled else error)
        else:
            self.future.set_result(image)


class Painter:
    """Makes images by one model.

    Args:
        directory: of the pipeline.
        denoiser: its denoiser, split; closing it is the caller's.
        from_image: whether images begin with others.
        at_once: images that are under way at once; further ones wait for their turn.

    Raises:
        ModelError: the pipeline cannot be loaded.
    """

    def __init__(
        self, directory: str, denoiser: SplitDenoiser, *, from_image: bool = False, at_once: int = 1
    ) -> None:
        self.denoiser = denoiser
        self._directory = directory
        #: Pipelines that make no image at present.
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        pipeline = _load(directory, denoiser, from_image)
        for _ in range(at_once):
            self._idle.put(_own(pipeline))

    def start(self, prompt: str, settings: ImageSettings) -> Painting:
        """Begins an image. Raises ConfigError for a size that the model cannot make."""
        check_size(self._directory, settings)

        def make(painting: Painting) -> Any:
            with self._turn() as pipeline:
                painting.holds(self.denoiser.session.abandon)

                def advance(steps: int, _total: int) -> None:
                    painting.check()
                    painting.steps = steps

                return _paint(pipeline, prompt, settings, advance)

        return Painting(make)

    def paint(self, prompt: str, settings: ImageSettings, on_step: OnStep | None = None, **more: Any) -> Any:
        """Makes an image, and returns it as Pillow's.

        Args:
            more: further arguments of the pipeline.

        Raises:
            ConfigError: the pipeline refuses an argument.
            SplitError: the worker or the queue failed, or the model cannot be split so.
        """
        with self._turn() as pipeline:
            return _paint(pipeline, prompt, settings, on_step, **more)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[Any]:
        """Waits for a pipeline."""
        pipeline = self._idle.get()
        try:
            yield pipeline
        finally:
            self._idle.put(pipeline)


def _paint(pipeline: Any, prompt: str, settings: ImageSettings, on_step: OnStep | None, **more: Any) -> Any:
    def advance(used: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1, getattr(used, "num_timesteps", settings.steps))
        return values

    options = settings.options() | more
    if settings.seed is not None:
        options["generator"] = torch.Generator().manual_seed(settings.seed % _SEEDS)
    with _refused_input():
        return pipeline(prompt, callback_on_step_end=advance, **options).images[0]


def _own(pipeline: Any) -> Any:
    """A pipeline of the same weights, and of its own all that changes while an image is made."""
    own = copy.copy(pipeline)
    for name, part in pipeline.components.items():
        # A tokenizer holds how it pads at present. A VAE of half precision may be cast when it decodes, and back.
        changes = isinstance(part, SchedulerMixin | PreTrainedTokenizerBase)
        if changes or (name == "vae" and part.dtype == torch.float16 and part.config.force_upcast):
            setattr(own, name, copy.deepcopy(part))
    return own


def _load(directory: str, denoiser: SplitDenoiser, from_image: bool) -> Any:
    """The checkpoint's own pipeline with the split denoiser. Raises ModelError."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    kind = diffusers.AutoPipelineForImage2Image if from_image else diffusers.AutoPipelineForText2Image
    try:
        pipeline = kind.from_pretrained(directory, **denoiser.pipeline_options(), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"the pipeline in {directory} cannot be loaded: {reason[0]}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def _refused_input() -> Iterator[None]:
    """What a pipeline says of its arguments is said as any wrong option."""
    try:
        yield
    except SplitError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None

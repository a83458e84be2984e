"""With what the lines of a batch are answered: models, and settings for lines that have none of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import msgspec

from split_device.batches.template import Template
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.settings import Sampling
from split_device.generation.structured import StructuredOutputs
from split_device.images.settings import ImageSettings
from split_device.jobs.job import ImageChoice, InitImage, ModelChoice


class BatchModels:
    """The two models of a batch, each resolved when the first line needs it.

    Args:
        text, image: resolve a model.
    """

    def __init__(self, text: Callable[[], ModelChoice], image: Callable[[], ImageChoice]) -> None:
        self._text, self._image = text, image

    @cached_property
    def text(self) -> ModelChoice:
        return self._text()

    @cached_property
    def image(self) -> ImageChoice:
        return self._image()

    def names(self) -> list[str]:
        """Names of the models that lines have needed so far."""
        return [vars(self)[kind].name for kind in ("text", "image") if kind in vars(self)]


@dataclass(frozen=True)
class BatchSettings:
    """Settings of a batch.

    Args:
        images: whether prompts ask for pictures.
        template: makes prompts of lines; None if lines have whole prompts.
        column: the column of a table with the prompts.
        system: a system message before each prompt.
        raw: whether prompts are continued as they are.
        sampling, stop, chat_template, structured: settings of prompts for texts.
        picture: settings of prompts for images, by the directory of the pipeline; raises ConfigError if that cannot
            make such an image.
        start: the image that all images begin with, by their settings and the directory; raises ConfigError if the
            settings contradict it.
        given: fields of `sampling`, and `stop`, that the user gave: they hold for OpenAI's requests, too.
        metadata: whether pictures' files carry their settings.
        media: directories below which requests may name files of images.
    """

    models: BatchModels
    images: bool = False
    template: Template | None = None
    column: str | None = None
    system: str | None = None
    raw: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    chat_template: ChatTemplate = field(default_factory=ChatTemplate)
    structured: StructuredOutputs | None = None
    picture: Callable[[str], ImageSettings] = lambda _directory: ImageSettings()
    start: Callable[[ImageSettings, str], InitImage | msgspec.UnsetType] = lambda *_: msgspec.UNSET
    given: frozenset[str] = field(default=frozenset())
    metadata: bool = True
    media: tuple[Path, ...] = ()

"""Options that belong together: one object for each group, which several commands take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from split_common.cli.groups import Group
from split_common.cli.options import (
    MODEL_PANEL,
    BrokerOption,
    DtypeOption,
    KeysOption,
    MemberOption,
    ModelOption,
    RevisionOption,
    TimeoutOption,
)
from split_common.models.split import DEFAULT_CUT, END_LAYERS
from split_device.cli.options import (
    CodecOption,
    CutOption,
    GuidanceOption,
    HeadOption,
    HistoryOption,
    ImageSeedOption,
    KvMemoryOption,
    MaxImagesOption,
    MaxJobsOption,
    MaxTokensOption,
    NegativeOption,
    PatienceOption,
    ReuseOption,
    SeedOption,
    SizeOption,
    StepsOption,
    StepTimeoutOption,
    TailOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from split_device.generation.limits import Limits
from split_device.generation.settings import Sampling
from split_device.images.settings import (
    IMAGE_MODEL,
    ImageSettings,
    check_size,
    need_diffusers,
    parse_pixels,
    pipeline_directory,
)
from split_device.jobs.job import ImageChoice, ModelChoice, checkpoint
from split_device.sessions.connection import Connection


@dataclass(frozen=True)
class TextModel:
    """A language model as given by options; `choice` resolves it."""

    model: str | None = None
    head_layers: int = END_LAYERS
    tail_layers: int = END_LAYERS
    dtype: str = "auto"
    revision: str | None = None

    def choice(self) -> ModelChoice:
        """The choice of the model. Raises ModelError if the demo model is missing and cannot be made."""
        return ModelChoice(
            name=checkpoint(self.model),
            revision=self.revision,
            head_layers=self.head_layers,
            tail_layers=self.tail_layers,
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class ImageModel:
    """An image model as given by options; `choice` resolves it."""

    pipeline: str | None = None
    cut: str = DEFAULT_CUT
    codec: str = "none"
    reuse: float = 1
    dtype: str = "auto"

    def choice(self) -> ImageChoice:
        """The choice of the model. Raises ConfigError if it has no pipeline, or packages for images are missing."""
        need_diffusers()
        return ImageChoice(
            name=pipeline_directory(self.pipeline),
            cut=self.cut,
            codec=self.codec,
            reuse=self.reuse,
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class Picture:
    """Settings of an image as given by options; `settings` checks them."""

    steps: int = ImageSettings.steps
    seed: int | None = None
    size: str | None = None
    guidance: float | None = None
    negative: str | None = None

    def settings(self, directory: str) -> ImageSettings:
        """The settings. Raises ConfigError if the pipeline in this directory cannot make such an image."""
        width, height = parse_pixels(self.size) if self.size is not None else (None, None)
        settings = ImageSettings(self.steps, width, height, self.guidance, self.negative, self.seed)
        settings = settings.checked()
        check_size(directory, settings)
        return settings


PipelineOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="DIR",
        envvar=IMAGE_MODEL,
        rich_help_panel=MODEL_PANEL,
        help="Directory of a pipeline in diffusers' safetensors format.",
    ),
]

CONNECTION = Group(
    broker=BrokerOption,
    keys=KeysOption,
    member=MemberOption,
    timeout=TimeoutOption,
    patience=PatienceOption,
    step_timeout=StepTimeoutOption,
    history_memory=HistoryOption,
)
LIMITS = Group(requests=MaxJobsOption, images=MaxImagesOption, kv_memory=KvMemoryOption)
TEXT_MODEL = Group(
    model=ModelOption,
    head_layers=HeadOption,
    tail_layers=TailOption,
    dtype=DtypeOption,
    revision=RevisionOption,
)
IMAGE_MODEL_CUT = Group(cut=CutOption, codec=CodecOption, reuse=ReuseOption, dtype=DtypeOption)
PICTURE = Group(
    steps=StepsOption, seed=ImageSeedOption, size=SizeOption, guidance=GuidanceOption, negative=NegativeOption
)

ConnectionOptions = Annotated[Connection, CONNECTION]
LimitOptions = Annotated[Limits, LIMITS]
TextModelOptions = Annotated[TextModel, TEXT_MODEL]
#: Without the pipeline, which each command names in its own way.
ImageModelOptions = Annotated[ImageModel, IMAGE_MODEL_CUT]
PictureOptions = Annotated[Picture, PICTURE]
SamplingOptions = Annotated[
    Sampling,
    Group(
        max_tokens=MaxTokensOption,
        temperature=TemperatureOption,
        top_p=TopPOption,
        top_k=TopKOption,
        seed=SeedOption,
    ),
]

"""Options that belong together: one object for each group, which several commands take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from split_common.cli.groups import Group
from split_common.cli.options import (
    AdaptersOption,
    BrokerOption,
    CutOption,
    DeviceOption,
    DtypeOption,
    KeysOption,
    LayersOption,
    MemberOption,
    ModelOption,
    RevisionOption,
    ThreadsOption,
    TimeoutOption,
    old_name,
)
from split_common.errors import ConfigError
from split_common.models.split import DEFAULT_CUT, DEFAULT_LAYERS, END_LAYERS, Layers
from split_common.system.files import user_path
from split_common.system.text import check_text
from split_device.cli.image_options import (
    GuidanceOption,
    ImageModelOption,
    InitImageOption,
    NegativeOption,
    ReuseOption,
    SizeOption,
    StepsOption,
    StrengthOption,
)
from split_device.cli.options import (
    ChatTemplateKwargsOption,
    ChatTemplateOption,
    CodecOption,
    HistoryOption,
    JobSpeculateOption,
    KvMemoryOption,
    MaxImagesOption,
    MaxJobsOption,
    MaxTokensOption,
    PadStepsOption,
    PatienceOption,
    PrefixCacheOption,
    SeedOption,
    SpeculateOption,
    StepTimeoutOption,
    TemperatureOption,
    TokenizerOption,
    TopKOption,
    TopPOption,
)
from split_device.cli.sampling_options import (
    BadWordsOption,
    FrequencyPenaltyOption,
    IgnoreEosOption,
    LogitBiasOption,
    MinPOption,
    MinTokensOption,
    PresencePenaltyOption,
    RepetitionPenaltyOption,
    StopTokenIdsOption,
)
from split_device.generation.chat_template import ChatTemplate, parse_template
from split_device.generation.limits import Limits
from split_device.generation.settings import Sampling
from split_device.images.files import file_digest, read_image
from split_device.images.settings import (
    STRENGTH,
    ImageSettings,
    check_pixels,
    check_size,
    check_start,
    need_diffusers,
    parse_pixels,
    pipeline_directory,
)
from split_device.jobs.job import ImageChoice, InitImage, ModelChoice, adapter_choices, checkpoint
from split_device.models.compression import CODECS, OLD_EXACT, TEXT_CODECS, check_codec
from split_device.models.hardware import Hardware
from split_device.sessions.connection import Connection


@dataclass(frozen=True)
class TextModel:
    """A language model as given by options; `choice` resolves it."""

    model: str | None = None
    layers: Layers | None = None
    dtype: str = "auto"
    revision: str | None = None
    tokenizer: str | None = None
    #: LoRA adapters, as `NAME=DIR` or `DIR`.
    adapter: list[str] | None = None
    codec: str = "exact"
    #: Numbers of layers before and after the body, as options used to name them.
    head_layers: int | None = None
    tail_layers: int | None = None

    def choice(self, several_adapters: bool = False) -> ModelChoice:
        """The choice of the model. Reads its configuration if --layers ends at a layer counted from the start.

        Args:
            several_adapters: whether there may be more than one.

        Raises:
            ModelError: the demo model is missing and cannot be made, or the configuration cannot be read.
            InvalidSplit: --layers is not a part of the model.
            ConfigError: the layers are named in two ways, there are more adapters than may be, or the codec is for
                images only.
            UnknownModel: a directory holds no adapter.
        """
        codec = check_codec(self.codec, TEXT_CODECS, "texts")
        adapters = adapter_choices(self.adapter or ())
        if len(adapters) > 1 and not several_adapters:
            raise ConfigError("--adapter is given more than once: an answer has one adapter")
        name = checkpoint(self.model)

        def count() -> int:
            from split_common.models.loading import read_spec

            return read_spec(name, self.revision).layers

        head, tail = chosen_layers(self.layers, self.head_layers, self.tail_layers).ends(count)
        return ModelChoice(
            name=name,
            revision=self.revision,
            head_layers=head,
            tail_layers=tail,
            dtype=self.dtype,
            tokenizer=checkpoint(self.tokenizer) if self.tokenizer is not None else msgspec.UNSET,
            adapters=adapters or msgspec.UNSET,
            codec=msgspec.UNSET if codec == "exact" else codec,
        )


@dataclass(frozen=True)
class PromptFormat:
    """How conversations become prompts, as given by options; `template` checks them."""

    chat_template: str | None = None
    chat_template_kwargs: str | None = None

    def template(self) -> ChatTemplate:
        """Raises ConfigError if the template cannot be read, or the values are not a JSON object."""
        return parse_template(self.chat_template, self.chat_template_kwargs)


def chosen_layers(layers: Layers | None, head_layers: int | None, tail_layers: int | None) -> Layers:
    """The body's range, named by --layers or by the options that it had before. Raises ConfigError for both."""
    if head_layers is None and tail_layers is None:
        return layers or DEFAULT_LAYERS
    if layers is not None:
        raise ConfigError("--head-layers and --tail-layers are old names of --layers: give --layers alone")
    head, tail = (END_LAYERS if ends is None else ends for ends in (head_layers, tail_layers))
    return Layers(head, -tail or None)


@dataclass(frozen=True)
class ImageModel:
    """An image model as given by options; `choice` resolves it."""

    image_model: str | None = None
    cut: str | None = None
    codec: str = "exact"
    reuse: float = 1
    dtype: str = "auto"

    def choice(self) -> ImageChoice:
        """The choice of the model.

        Raises:
            ConfigError: it has no pipeline, packages for images are missing, or the codec is for texts only.
        """
        codec = check_codec(self.codec, [name for name in CODECS if name != OLD_EXACT], "images")
        need_diffusers()
        return ImageChoice(
            name=pipeline_directory(self.image_model),
            cut=self.cut or DEFAULT_CUT,
            codec=OLD_EXACT if codec == "exact" else codec,
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


@dataclass(frozen=True)
class Start:
    """The image that an image begins with, as given by options."""

    init_image: Path | None = None
    strength: float | None = None

    def read(self, settings: ImageSettings, directory: str) -> dict[str, Any]:
        """Arguments of a pipeline's call: the image, and how much of it is to change; none without an image.

        Raises:
            ConfigError: the image cannot be read, or is too large for the pipeline in this directory, or the
                settings contradict it.
        """
        if self.init_image is None:
            if self.strength is not None:
                raise ConfigError("--strength needs --init-image")
            return {}
        strength = STRENGTH if self.strength is None else self.strength
        check_start(settings, strength)
        image = read_image(self.init_image)
        check_pixels(directory, *image.size)
        return {"image": image, "strength": strength}

    def reference(self, settings: ImageSettings, directory: str) -> InitImage | msgspec.UnsetType:
        """The same for a job, which reads the image when it runs. Raises ConfigError."""
        if not (found := self.read(settings, directory)) or self.init_image is None:
            return msgspec.UNSET
        path = user_path(self.init_image).resolve()
        return InitImage(
            path=check_text(str(path), "the initial image's path"),
            sha256=file_digest(path),
            strength=found["strength"],
        )


OldHeadOption = Annotated[int | None, old_name("--head-layers", "--layers FIRST:LAST", "N")]
OldTailOption = Annotated[int | None, old_name("--tail-layers", "--layers FIRST:LAST", "N")]

CONNECTION = Group(
    broker=BrokerOption,
    keys=KeysOption,
    member=MemberOption,
    timeout=TimeoutOption,
    patience=PatienceOption,
    step_timeout=StepTimeoutOption,
    history_memory=HistoryOption,
    pad_steps=PadStepsOption,
)
HARDWARE = Group(device=DeviceOption, threads=ThreadsOption)
LIMITS = Group(
    requests=MaxJobsOption,
    images=MaxImagesOption,
    kv_memory=KvMemoryOption,
    prefix_cache=PrefixCacheOption,
    speculate=SpeculateOption,
)
TEXT_MODEL = Group(
    model=ModelOption,
    layers=LayersOption,
    dtype=DtypeOption,
    revision=RevisionOption,
    tokenizer=TokenizerOption,
    adapter=AdaptersOption,
    codec=CodecOption,
    head_layers=OldHeadOption,
    tail_layers=OldTailOption,
)
IMAGE_MODEL_CUT = Group(
    image_model=ImageModelOption, cut=CutOption, codec=CodecOption, reuse=ReuseOption, dtype=DtypeOption
)
PROMPT_FORMAT = Group(chat_template=ChatTemplateOption, chat_template_kwargs=ChatTemplateKwargsOption)
PICTURE = Group(
    steps=StepsOption, seed=SeedOption, size=SizeOption, guidance=GuidanceOption, negative=NegativeOption
)

ConnectionOptions = Annotated[Connection, CONNECTION]
HardwareOptions = Annotated[Hardware, HARDWARE]
LimitOptions = Annotated[Limits, LIMITS]
#: Of commands with one request at a time.
AnswerLimits = Annotated[Limits, Group(kv_memory=KvMemoryOption, speculate=SpeculateOption)]
TextModelOptions = Annotated[TextModel, TEXT_MODEL]
ImageModelOptions = Annotated[ImageModel, IMAGE_MODEL_CUT]
PromptFormatOptions = Annotated[PromptFormat, PROMPT_FORMAT]
PictureOptions = Annotated[Picture, PICTURE]
StartOptions = Annotated[Start, Group(init_image=InitImageOption, strength=StrengthOption)]
SAMPLING = Group(
    max_tokens=MaxTokensOption,
    temperature=TemperatureOption,
    top_p=TopPOption,
    top_k=TopKOption,
    min_p=MinPOption,
    repetition_penalty=RepetitionPenaltyOption,
    frequency_penalty=FrequencyPenaltyOption,
    presence_penalty=PresencePenaltyOption,
    logit_bias=LogitBiasOption,
    bad_words=BadWordsOption,
    min_tokens=MinTokensOption,
    stop_token_ids=StopTokenIdsOption,
    ignore_eos=IgnoreEosOption,
    seed=SeedOption,
)
SamplingOptions = Annotated[Sampling, SAMPLING]
#: Of jobs, which an agent runs with others.
JobSamplingOptions = Annotated[Sampling, Group(**SAMPLING.options, speculate=JobSpeculateOption)]
#: Of requests that name none.
SamplingDefaults = Annotated[
    Sampling,
    Group(
        temperature=TemperatureOption,
        top_p=TopPOption,
        top_k=TopKOption,
        min_p=MinPOption,
        repetition_penalty=RepetitionPenaltyOption,
    ),
]

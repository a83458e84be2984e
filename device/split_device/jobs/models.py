"""Models that run jobs. Each is loaded once, and has its own generator or pipeline."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from transformers import GenerationConfig

from split_common.errors import ConfigError, PromptTooLong, SplitError
from split_common.models.adapters import parse_adapters
from split_common.models.checkpoint import Checkpoint
from split_common.models.checkpoint_files import local_files, model_name
from split_common.models.codecs import EXACT
from split_common.models.layer_stack import UNLIMITED, max_positions
from split_common.models.loading import generation_config, read_spec
from split_common.system.files import user_path
from split_common.system.signals import interrupt_on_sigterm
from split_device.generation.answers import AnswerStream, answer_format
from split_device.generation.bad_words import bad_word_tokens, check_named_tokens
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.detokenize import CONTINUED
from split_device.generation.generator import Generator, Request
from split_device.generation.image_prompts import (
    ImagePrompt,
    encode_with_images,
    load_processor,
    with_processor,
)
from split_device.generation.limits import Limits
from split_device.generation.sampling import check_defaults, check_values
from split_device.generation.settings import SEED_BOUND, check_prompt_logprobs
from split_device.generation.structured import StructuredOutputs
from split_device.generation.tokenizing import (
    encode_chat,
    encode_text,
    end_tokens,
    load_tokenizer,
    pad_token,
)
from split_device.generation.tool_styles import thinking_of
from split_device.images.settings import need_diffusers
from split_device.jobs.conversation import chat_messages
from split_device.jobs.job import ImageChoice, JobProgress, ModelChoice, Task
from split_device.jobs.message_images import has_images, shown_images
from split_device.models.hardware import Hardware
from split_device.models.language import SplitModelForCausalLM, SplitModelForImageTextToText
from split_device.sessions.connection import Connection
from split_device.speculation.names import draft_model

if TYPE_CHECKING:
    from split_device.generation.constraint import Grammars
    from split_device.images.pipeline import ImagePipeline
    from split_device.models.denoiser import SplitDenoiser

log = logging.getLogger(__name__)

#: Files of a checkpoint whose processor may take images.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to generate."""

    model: Any
    tokenizer: Any
    generator: Generator
    #: What makes prompts with images; None for a model for texts.
    processor: Any = None

    @property
    def end_tokens(self) -> set[int]:
        return end_tokens(self.model, self.tokenizer)

    @property
    def limit(self) -> int:
        """Most tokens of prompt and answer. Without a limit of the model's own, memory ends a text."""
        limit, capacity = max_positions(self.model.config), self.generator.capacity
        return limit if limit < UNLIMITED or capacity is None else capacity

    @functools.cached_property
    def grammars(self) -> Grammars:
        """The grammars of constraints on answers. The module is imported when the first one is needed."""
        from split_device.generation.constraint import Grammars

        vocabulary = int(self.model.config.get_text_config(decoder=True).vocab_size)
        return Grammars(self.tokenizer, vocabulary, self.end_tokens)

    def structured(self, task: Task) -> StructuredOutputs | None:
        """What a task's answer has to look like; None for any text.

        Raises:
            UnsupportedField: this cannot be enforced as the model calls tools.
            ConfigError: as `encode`.
        """
        structured = None if task.structured is msgspec.UNSET else task.structured
        if isinstance(task.prompt, str) or not (task.tool_use or structured):
            return structured
        from split_device.generation.call_grammar import call_constraint

        template = self._template(task)
        format_ = answer_format(self.tokenizer, template, task.tool_use or None)
        thinking = None
        if not task.continues:
            thinking = thinking_of(template.source(self.tokenizer), template.opening(self.tokenizer))
        return call_constraint(self.tokenizer, format_, structured, thinking)

    def encode(self, task: Task) -> list[int]:
        """The token ids of a task's prompt.

        Raises:
            PromptTooLong: the prompt is empty, or leaves no room for an answer.
            ConfigError: as `tokens`.
        """
        bad_word_tokens(self.tokenizer, task.sampling.bad_words or ())
        return self.fitting(self.tokens(task, self.limit))

    def fitting(self, prompt: list[int]) -> list[int]:
        """A prompt's token ids. Raises PromptTooLong if it is empty, or leaves no room for an answer."""
        if not prompt:
            raise PromptTooLong("the prompt has no tokens")
        if len(prompt) >= (limit := self.limit):
            raise PromptTooLong(f"{len(prompt)} tokens leave no room in the model's {limit} positions")
        return prompt

    def tokens(self, task: Task, limit: int | None = None) -> list[int]:
        """The token ids of a task's prompt, however many they are. Raises as `prompt_tokens`."""
        return prompt_tokens(task, self.tokenizer, self.processor, limit)

    def _template(self, task: Task) -> ChatTemplate:
        """The template by which answers are read: the one by which a conversation becomes its prompt."""
        own = isinstance(getattr(self.tokenizer, "response_template", None), dict)
        if own or self.processor is None or isinstance(task.prompt, str) or not has_images(task.prompt):
            return task.template
        return with_processor(task.template, self.processor)

    def answer(
        self,
        task: Task,
        prompt: Sequence[int],
        name: str | None = None,
    ) -> AnswerStream:
        """What reads a task's answer.

        Args:
            prompt: what `encode` returned for the task.
            name: a name of the answer, of which ids of calls are made; None for random ones.
        """
        format_ = None
        if not isinstance(task.prompt, str):
            format_ = answer_format(self.tokenizer, self._template(task), task.tool_use or None)
        before = prompt[-CONTINUED:] if task.continues else ()
        return AnswerStream(self.tokenizer, format_, prompt, task.stop, before, name)

    def request(self, task: Task, progress: JobProgress, priority: int, prompt: list[int] | None = None) -> Request:
        """The generator's request for a task. What its sampling leaves open is as in the checkpoint.

        Args:
            prompt: what `encode` returned for the task; None to encode it now.

        Raises:
            PromptTooLong: as `encode`.
            ConfigError: as `encode`, or a number is out of bounds, a token to stop at is not the model's, or
                too many log probabilities are asked.
            ConfigError, UnsupportedFeature: what the answer has to look like is refused; see `Grammars.compile`.
        """
        prompt = self.encode(task) if prompt is None else prompt
        scored = task.prompt_logprobs if isinstance(task.prompt_logprobs, int) else None
        if scored is not None:
            check_prompt_logprobs(len(prompt), scored)
        structured = self.structured(task)
        limit, sampling = self.limit, task.sampling.checked().resolved(self.model.generation_config)
        check_named_tokens(self.model, [sampling.stop_token_ids or ()])
        config = GenerationConfig(
            max_new_tokens=min(sampling.max_tokens, limit - len(prompt)),
            eos_token_id=sampling.ends(self.end_tokens),
            pad_token_id=pad_token(self.tokenizer),
            **sampling.options(bad_word_tokens(self.tokenizer, sampling.bad_words or ())),
        )
        if config.min_new_tokens is not None:
            config.min_new_tokens = min(config.min_new_tokens, config.max_new_tokens)
        seed = None if sampling.seed is None else sampling.seed % SEED_BOUND
        return Request(
            prompt,
            config,
            seed=seed,
            images=prompt.images if isinstance(prompt, ImagePrompt) else {},
            generated=progress.tokens,
            sampler=progress.sampler,
            priority=priority,
            logprobs=task.logprobs if isinstance(task.logprobs, int) else None,
            prompt_logprobs=scored,
            frequency_penalty=sampling.frequency_penalty or 0.0,
            presence_penalty=sampling.presence_penalty or 0.0,
            constraint=None if structured is None else self.grammars.constraint(structured),
            speculate=sampling.speculate,
        )


def prompt_tokens(task: Task, tokenizer: Any, processor: Any = None, limit: int | None = None) -> list[int]:
    """The token ids of a task's prompt, however many they are.

    Args:
        processor: makes prompts with images; None for a model for texts.
        limit: how many tokens fit; None for no limit.

    Raises:
        PromptTooLong: they are far more than `limit`.
        ConfigError: the chat template refuses the conversation, or does not read a variable that is set; or the
            conversation is not UTF-8, or has images that cannot be read, or that the model does not take.
    """
    if not isinstance(task.prompt_token_ids, msgspec.UnsetType):
        return list(task.prompt_token_ids)
    if isinstance(task.prompt, str):
        ids = encode_text(tokenizer, task.prompt, limit)
    else:
        template, tool_use = task.template, task.tool_use or None
        messages = chat_messages(task.prompt, template.source(tokenizer))
        if has_images(task.prompt):
            if processor is None:
                raise ConfigError(f"{model_name(task.model.name)} takes no images: it is a model for texts")
            shown = shown_images(task.prompt)
            return encode_with_images(processor, messages, shown, task.continues, template, tool_use)
        ids = encode_chat(tokenizer, messages, task.continues, template, tool_use, limit)
    tokens: list[int] = ids[0].tolist()
    return tokens


def load_model(
    choice: ModelChoice, connection: Connection, hardware: Hardware = Hardware(), images: bool = False
) -> Any:
    """The language model of a choice, split, for the commands. With `images`, it is one that takes images.

    Raises:
        ConfigError: there is no such device.
        UnsupportedFeature: a default of the checkpoint for `generate` is none that the commands can do.
        SplitError: see `SplitModelForCausalLM.from_pretrained`.
    """
    place = hardware.use(auto="cpu")
    # Before any weights are loaded: jobs of a model that is refused are refused one by one.
    found = Checkpoint.resolve(choice.name, choice.revision)
    check_defaults(generation_config(found), choice.name)
    split_class = SplitModelForImageTextToText if images else SplitModelForCausalLM
    model = split_class.from_pretrained(
        choice.name,
        connection=connection,
        head_layers=choice.head_layers,
        tail_layers=choice.tail_layers,
        dtype=choice.dtype,
        revision=choice.revision,
        adapter=parse_adapters(choice.adapters or ()),
        codec=choice.codec or EXACT,
    )
    try:
        if len(names := model.split_parts.adapters.names) == 1:
            model.set_adapter(names)
        check_values(model)
        model.to(place)
        model.warm_up()
    except BaseException:
        model.close()
        raise
    return model


@contextlib.contextmanager
def loaded_model(
    choice: ModelChoice, connection: Connection, limits: Limits, hardware: Hardware, tokenizer: Any, processor: Any
) -> Iterator[Loaded]:
    """A model that is ready to generate, until the context ends.

    Args:
        tokenizer, processor: those of the choice; None in place of a processor for texts alone.

    Raises:
        SplitError: as `load_model` and `Generator`.
    """
    model = load_model(choice, connection, hardware, images=processor is not None)
    with model, Generator(model, limits=limits, tokenizer=tokenizer) as generator:
        yield Loaded(model, tokenizer, generator, processor)


def processor_place(choice: ModelChoice) -> tuple[str, str | None] | None:
    """Where a processor lies, and its revision: with the tokenizer, or else with the weights; None if nowhere.

    Raises:
        ModelError: one of its files cannot be read.
    """
    for name, revision in dict.fromkeys((choice.tokenizer_place, (choice.name, choice.revision))):
        directory = user_path(name)
        # A tokenizer may lie where no weights do.
        find = local_files(directory) if directory.is_dir() else Checkpoint.resolve(name, revision).find
        found = []
        for file in _PROCESSOR_FILES:
            with contextlib.suppress(FileNotFoundError):
                found.append(find(file))
        if any(found):
            return name, revision
    return None


def find_processor(choice: ModelChoice) -> Any:
    """The processor of a model that takes images; None for a model for texts."""
    place = processor_place(choice)
    if place is None or (found := Checkpoint.resolve(choice.name, choice.revision)).gguf is not None:
        return None
    try:
        processor = load_processor(*place)
        read_spec(found, images=True)
    except SplitError as error:
        log.warning("%s takes text only: %s", model_name(choice.name), error)
        return None
    return processor


def load_image_model(choice: ImageChoice, connection: Connection, hardware: Hardware = Hardware()) -> SplitDenoiser:
    """The denoiser of a choice, split. Errors are those of `load_denoiser`, and ConfigError without the device."""
    from split_device.models.registry import load_denoiser

    place = hardware.use()
    denoiser: Any = load_denoiser(
        choice.name,
        connection=connection,
        cut=choice.cut,
        codec=choice.codec,
        reuse=choice.reuse,
        dtype=choice.dtype,
    )
    try:
        denoiser.to(place)
    except BaseException:
        denoiser.close()
        raise
    split: SplitDenoiser = denoiser
    return split


class Models:
    """Loads each model when it is first used. A context manager, which closes them."""

    def __init__(self, connection: Connection, limits: Limits, hardware: Hardware = Hardware()) -> None:
        self.limits = limits
        self._hardware = hardware
        self._connection = connection
        self._loaded: dict[ModelChoice, Loaded] = {}
        self._pipelines: dict[ImageChoice, ImagePipeline] = {}
        self._stack = contextlib.ExitStack()

    def get(self, choice: ModelChoice) -> Loaded:
        """Raises what `SplitModelForCausalLM.from_pretrained` and `load_tokenizer` raise."""
        if choice not in self._loaded:
            with interrupt_on_sigterm():
                self._loaded[choice] = self._load(choice)
        return self._loaded[choice]

    def _load(self, choice: ModelChoice) -> Loaded:
        log.info("loading %s", model_name(choice.name))
        if (draft := draft_model(self.limits.speculate)) is not None:
            log.info("loading %s, which drafts for %s alone", model_name(draft), model_name(choice.name))
        tokenizer = load_tokenizer(*choice.tokenizer_place)
        processor = find_processor(choice)
        place = self._connection, self.limits, self._hardware
        return self._stack.enter_context(loaded_model(choice, *place, tokenizer, processor))

    def pipeline(self, choice: ImageChoice) -> ImagePipeline:
        """Raises what `load_denoiser` and `ImagePipeline` raise."""
        if choice not in self._pipelines:
            with interrupt_on_sigterm():
                self._pipelines[choice] = self._load_pipeline(choice)
        return self._pipelines[choice]

    def _load_pipeline(self, choice: ImageChoice) -> ImagePipeline:
        need_diffusers()
        from split_device.images.pipeline import ImagePipeline

        log.info("loading %s", model_name(choice.name))
        denoiser = self._stack.enter_context(load_image_model(choice, self._connection, self._hardware))
        return ImagePipeline(choice.name, denoiser, at_once=self.limits.images)

    def __enter__(self) -> Models:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

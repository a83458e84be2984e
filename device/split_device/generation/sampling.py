"""Sampling by transformers' own logits processors. Each request has its own random generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)
from transformers.generation import GenerationMode
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from split_common.compat.transformers import complete_config, complete_lengths, eos_tokens, logits_processors
from split_common.errors import ConfigError, PromptTooLong, UnsupportedFeature
from split_device.generation.bad_words import check_named_tokens
from split_device.generation.occurrences import Occurrences
from split_device.generation.penalties import ConstraintMask, OccurrencePenalty
from split_device.generation.request import FinishReason, Request
from split_device.generation.sequence_bias import SequenceBias
from split_device.generation.settings import SEED_BOUND, Sampling, within_bounds
from split_device.models.language import check_tokens

#: Options of `generate` that take more than choosing one token after the other, each with the values that change
#: nothing. They are refused for batched requests, and as a checkpoint's defaults by all commands.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "guidance_scale": (None, 1),
    "encoder_repetition_penalty": (None, 1),
    "encoder_no_repeat_ngram_size": (None, 0),
    "stop_strings": (None, []),
    "max_time": (None,),
    "token_healing": (None, False),
    # With the others, tokens are those of a dynamic cache.
    "cache_implementation": (None, *sorted({*ALL_CACHE_IMPLEMENTATIONS} - {"quantized"})),
}


#: Processors that rule out end tokens until a text is long enough.
_AT_LEAST = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)


#: Processors in whose place ours is used.
_BIASES = (NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor)


def _least(processor: Any, prompt: int) -> int:
    """The length of prompt and text from which a processor of `_AT_LEAST` does nothing; 0 for others."""
    if type(processor) is MinNewTokensLengthLogitsProcessor:
        return prompt + int(processor.min_new_tokens)
    return int(processor.min_length) if type(processor) is MinLengthLogitsProcessor else 0


def check_defaults(config: GenerationConfig, name: str) -> None:
    """Raises UnsupportedFeature if the defaults for `generate` of a checkpoint ask for what no command can do.

    `generate` from Python does these things.
    """
    for option, value in _refused(config):
        raise UnsupportedFeature(
            f"the generation defaults of {name} set {option}={value!r}, which lambda-split's commands cannot do: "
            "remove it from generation_config.json (or config.json), or use generate from Python"
        )


def check_values(model: Any) -> None:
    """Raises ConfigError if transformers refuses a value among the model's defaults for `generate`."""
    for sampling in (Sampling(1, 0.0, 1.0, 0), Sampling(1, 1.0, 1.0, 0)):
        try:
            _prepared(model, GenerationConfig(max_new_tokens=1, **sampling.options()), 1, [])
        except ConfigError as error:
            raise ConfigError(f"the generation defaults of {model.name_or_path}: {error}") from None


def _refused(config: GenerationConfig) -> Iterator[tuple[str, Any]]:
    """The options in a configuration that are refused, and their values."""
    for name, harmless in _REFUSED.items():
        if (value := getattr(config, name, None)) not in harmless:
            yield name, value


class Sampler:
    """How the tokens of one request are chosen, and the text so far.

    Args:
        model: made by `SplitModelForCausalLM.from_pretrained`.
        request: what was asked.
        indivisible: whether tokens that go through the model together differ from those that go one by one.

    Raises:
        UnsupportedFeature: the configuration asks for more than greedy decoding or sampling of one sequence.
        ConfigError: the request or its configuration makes no sense.
        PromptTooLong: the prompt exceeds the model's positions.
    """

    def __init__(self, model: Any, request: Request, indivisible: bool = False) -> None:
        prompt = len(request.prompt)
        if not prompt:
            raise ConfigError("a prompt has at least one token")
        check_tokens(model, [*request.prompt, *request.generated])
        positions: int = model.split_parts.max_positions
        if prompt > positions:
            raise PromptTooLong(f"{prompt} tokens exceed the model's {positions} positions")
        bias = request.config.sequence_bias
        check_named_tokens(model, request.config.bad_words_ids or (), bias if isinstance(bias, dict) else ())
        config, processors = _prepared(model, request.config, prompt, _own_processors(request))
        self._processors = [SequenceBias(each) if type(each) in _BIASES else each for each in processors]
        #: Most tokens of prompt and text together. The last one needs no position.
        self.max_length: int = min(int(config.max_length), positions + 1)
        self._max_new_tokens = self.max_length - prompt
        self._eos = eos_tokens(config)
        #: Whether tokens that go through the model together differ from those that go one by one.
        self.indivisible = indivisible
        self._vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        #: Length of prompt and text from which processors that keep back end tokens do nothing.
        self._least = max((_least(each, prompt) for each in self._processors), default=0)
        #: Number of alternatives to report with each token; None for no log probabilities.
        self.logprobs = request.logprobs
        #: What tokens are drawn with; None if they are not.
        self.generator: torch.Generator | None = None
        if config.do_sample:
            self.generator = _generator(request)
        # A tensor, because logits processors look at all tokens.
        self._ids = torch.empty(1, 0, dtype=torch.long)
        self._length = 0
        self._append([*request.prompt, *request.generated])
        #: What is counted in the text, by the type of the processor that needs it.
        self.occurrences: dict[type, Occurrences] = {}
        for processor in self._processors:
            if type(processor) is RepetitionPenaltyLogitsProcessor:
                self.occurrences[type(processor)] = Occurrences([*request.prompt, *request.generated])
            elif type(processor) is OccurrencePenalty:
                self.occurrences[type(processor)] = Occurrences(request.generated)
        self._constraint = request.constraint
        if self._constraint is not None:
            for token in request.generated:
                self._constraint.accept(token)

    @property
    def likeliest(self) -> bool:
        """Whether each token is the likeliest one, without processors."""
        return not self._processors and self.generator is None

    @property
    def processors(self) -> list[Any]:
        """The logits processors that change anything at the next token."""
        return [
            processor
            for processor in self._processors
            if not (type(processor) in _AT_LEAST and self._length >= self._least)
        ]

    def prepare(self) -> bool:
        """Finds out what the constraint allows next. Returns whether there is one."""
        masks = [processor for processor in self._processors if isinstance(processor, ConstraintMask)]
        for mask in masks:
            mask.prepare()
        return bool(masks)

    @property
    def ids(self) -> torch.Tensor:
        """Prompt and text so far, int64 `[1, tokens]`."""
        return self._ids[:, : self._length]

    @property
    def state(self) -> bytes | None:
        """The random generator's state; None for greedy decoding."""
        return self.generator.get_state().numpy().tobytes() if self.generator is not None else None

    def finish_reason(self, generated: Sequence[int]) -> FinishReason | None:
        """Why a text with these tokens is complete; None if it is not."""
        if (generated and generated[-1] in self._eos) or (
            self._constraint is not None and self._constraint.finished
        ):
            return "stop"
        return "length" if len(generated) >= self._max_new_tokens else None

    def remaining(self, generated: Sequence[int]) -> int:
        """Most tokens that a text with these tokens may still get."""
        return self._max_new_tokens - len(generated)

    def accept(self, token: int) -> None:
        """Continues the text with this token."""
        self._append([token])
        for text in self.occurrences.values():
            text.add(token)
        if self._constraint is not None:
            self._constraint.accept(token)

    def take_forced(self) -> int | None:
        """The only token that the constraint allows, which needs no logits; None if there are several.

        None as well if log probabilities are wanted, which are made of logits, or if tokens that go through the
        model together differ from those that go one by one. The random generator goes on as if the token had been
        drawn.
        """
        if self._constraint is None or self.logprobs is not None or self.indivisible:
            return None
        token = self._constraint.forced()
        if token is not None and self.generator is not None:
            torch.empty(self._vocabulary).exponential_(1, generator=self.generator)
        return token

    def _append(self, tokens: Sequence[int]) -> None:
        end = self._length + len(tokens)
        if end > self.max_length:
            return
        if end > self._ids.shape[1]:
            # Grown as needed: models without a limit of positions may allow more tokens than memory holds.
            larger = torch.empty(1, min(2 * end, self.max_length), dtype=torch.long)
            larger[:, : self._length] = self._ids[:, : self._length]
            self._ids = larger
        self._ids[0, self._length : end] = torch.tensor(tokens, dtype=torch.long)
        self._length = end


def _prepared(model: Any, given: GenerationConfig, prompt: int, own: list[Any]) -> tuple[Any, Any]:
    """The configuration as `generate` completes it, and its logits processors.

    Args:
        own: further processors; they apply where `generate` has those of its callers.

    Raises:
        UnsupportedFeature, ConfigError: see `Sampler`.
    """
    try:
        config = complete_config(model, given)
        mode = config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise UnsupportedFeature(
                f"{mode.value.replace('_', ' ')} is not batched with other requests: use generate"
            )
        if given.return_dict_in_generate:
            raise UnsupportedFeature("return_dict_in_generate: a request gives tokens alone; use generate")
        for name, value in _refused(config):
            raise UnsupportedFeature(f"{name}={value!r} is not batched with other requests: use generate")
        config = complete_lengths(model, config, given, prompt)
        processors = logits_processors(model, config, prompt, own)
    except UnsupportedFeature:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"transformers refuses this generation configuration: {error}") from None
    if config.max_length <= prompt:
        raise ConfigError(f"max_new_tokens or max_length leave no token to generate after a prompt of {prompt}")
    return config, processors


def _own_processors(request: Request) -> list[Any]:
    """The request's processors that transformers does not have, in the order in which they apply."""
    processors: list[Any] = []
    if request.frequency_penalty or request.presence_penalty:
        penalties = [request.frequency_penalty, request.presence_penalty]
        for name, value in zip(("frequency_penalty", "presence_penalty"), penalties, strict=True):
            within_bounds(name, value)
        processors.append(OccurrencePenalty(len(request.prompt), *penalties))
    if request.constraint is not None:
        processors.append(ConstraintMask(request.constraint))
    return processors


def _generator(request: Request) -> torch.Generator:
    generator = torch.Generator()
    if request.sampler is not None:
        try:
            generator.set_state(torch.frombuffer(bytearray(request.sampler), dtype=torch.uint8))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"this is not a sampler's state: {error}") from None
    elif request.generated:
        raise ConfigError("a sampled request cannot be continued without its sampler's state")
    elif request.seed is not None:
        generator.manual_seed(within_bounds("seed", request.seed) % SEED_BOUND)
    else:
        generator.seed()
    return generator

"""Sampling by transformers' own logits processors. Each request has its own random generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from split_common.compat.transformers import complete_config, complete_lengths, eos_tokens, logits_processors
from split_common.errors import ConfigError, PromptTooLong, UnsupportedFeature
from split_device.generation.request import FinishReason, Logprobs, Request

#: Options of `generate` that are refused for batched requests, each with its values that change nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_return_sequences": (None, 1),
    "guidance_scale": (None, 1),
    "stop_strings": (None,),
    "max_time": (None,),
    "token_healing": (None, False),
    "return_dict_in_generate": (None, False),
}


class Sampler:
    """Chooses the tokens of one request.

    Raises:
        UnsupportedFeature: the configuration asks for more than greedy decoding or sampling of one sequence.
        ConfigError: the request or its configuration makes no sense.
        PromptTooLong: the prompt exceeds the model's positions.
    """

    def __init__(self, model: Any, request: Request) -> None:
        prompt = len(request.prompt)
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        if not prompt or not all(0 <= token < vocabulary for token in (*request.prompt, *request.generated)):
            raise ConfigError(f"a prompt has at least one token, and all are from 0 to {vocabulary - 1}")
        positions: int = model.split_parts.max_positions
        if prompt > positions:
            raise PromptTooLong(f"{prompt} tokens exceed the model's {positions} positions")
        config = _prepared(model, request.config, prompt)
        #: Most tokens of prompt and text together. The last one needs no position.
        self.max_length: int = min(int(config.max_length), positions + 1)
        self._max_new_tokens = self.max_length - prompt
        self._eos = eos_tokens(config)
        self._logprobs = request.logprobs
        self._processors = logits_processors(model, config, prompt)
        self._generator: torch.Generator | None = None
        if config.do_sample:
            self._generator = _generator(request)
        # A tensor, because logits processors look at all tokens.
        self._ids = torch.empty(1, self.max_length, dtype=torch.long)
        self._length = 0
        self._append([*request.prompt, *request.generated])

    @property
    def plain(self) -> bool:
        """Whether each token is the likeliest one, without processors and log probabilities."""
        return not self._processors and self._generator is None and self._logprobs is None

    @property
    def state(self) -> bytes | None:
        """The random generator's state; None for greedy decoding."""
        return self._generator.get_state().numpy().tobytes() if self._generator is not None else None

    def finish_reason(self, generated: Sequence[int]) -> FinishReason | None:
        """Why a text with these tokens is complete; None if it is not."""
        if generated and generated[-1] in self._eos:
            return "stop"
        return "length" if len(generated) >= self._max_new_tokens else None

    def accept(self, token: int) -> None:
        """Continues the text with this token."""
        self._append([token])

    def choose(self, logits: torch.Tensor) -> tuple[int, Logprobs | None]:
        """Chooses the next token from its logits, float32 `[vocabulary]`."""
        scores = self._processors(self._ids[:, : self._length], logits[None].clone())
        if self._generator is None:
            token = int(scores.argmax(-1))
        else:
            probabilities = torch.softmax(scores, dim=-1)
            token = int(torch.multinomial(probabilities, num_samples=1, generator=self._generator))
        if self._logprobs is None:
            return token, None
        logprobs = torch.log_softmax(logits, -1)
        top = logprobs.topk(min(self._logprobs, len(logprobs)))
        likeliest = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return token, Logprobs(float(logprobs[token]), likeliest)

    def _append(self, tokens: Sequence[int]) -> None:
        end = self._length + len(tokens)
        if end <= self._ids.shape[1]:
            self._ids[0, self._length : end] = torch.tensor(tokens, dtype=torch.long)
            self._length = end


def _prepared(model: Any, given: GenerationConfig, prompt: int) -> Any:
    """The configuration as `generate` completes it. Raises UnsupportedFeature and ConfigError, see `Sampler`."""
    try:
        config = complete_config(model, given)
        mode = config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise UnsupportedFeature(
                f"{mode.value.replace('_', ' ')} is not batched with other requests: use generate"
            )
        for name, harmless in _REFUSED.items():
            if (value := getattr(config, name, None)) not in harmless:
                raise UnsupportedFeature(f"{name}={value!r} is not batched with other requests: use generate")
        config = complete_lengths(model, config, given, prompt)
    except UnsupportedFeature:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"a generation configuration that transformers refuses: {error}") from None
    if config.max_length <= prompt:
        raise ConfigError(f"max_new_tokens or max_length leave no token to generate after a prompt of {prompt}")
    return config


def _generator(request: Request) -> torch.Generator:
    generator = torch.Generator()
    if request.sampler is not None:
        try:
            generator.set_state(torch.frombuffer(bytearray(request.sampler), dtype=torch.uint8))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"this is not a sampler's state: {error}") from None
    elif request.generated:
        raise ConfigError("to continue a sampled request takes its sampler's state, which is missing")
    elif request.seed is not None:
        generator.manual_seed(request.seed)
    else:
        generator.seed()
    return generator

"""Conversations with a split model: prompts, streamed answers, and a cache that is continued."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache
from transformers.generation.streamers import TextStreamer

from split_common.checkpoint import Checkpoint
from split_common.errors import ConfigError, PromptTooLong, UnknownModel
from split_device.settings import Sampling

Message = dict[str, str]


@dataclass(frozen=True)
class Answer:
    """A generated text. Times in seconds; the first token's includes the prompt's prefill."""

    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: str
    first_token_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the first token, which waits for the prompt, is left out."""
        return (self.tokens - 1) / (self.seconds - self.first_token_seconds) if self.tokens > 1 else 0.0


def _nothing(_text: str = "") -> None:
    pass


class _Stream(TextStreamer):  # type: ignore[misc]
    """Passes text on as soon as it is complete, and notes when the first token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], on_first_token: Callable[[], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self._on_first_token = on_first_token
        self._calls = 0
        self.first_token: float | None = None

    def put(self, value: torch.Tensor) -> None:
        self._calls += 1
        if self._calls == 2:  # the first call is the prompt
            self.first_token = time.perf_counter()
            self._on_first_token()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


class Conversation:
    """A conversation whose turns share one cache: only what is new is sent.

    Args:
        model: a split model (any causal language model of transformers will do).
        tokenizer: its tokenizer.
        start: messages before the first turn, e.g. a system message.
    """

    def __init__(self, model: Any, tokenizer: Any, start: Sequence[Message] = ()) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._start = tuple(start)
        self.reset()

    def reset(self) -> None:
        """Forgets all turns."""
        self.messages: list[Message] = list(self._start)
        self._cached = torch.zeros(1, 0, dtype=torch.long)
        self._cache = DynamicCache(config=self._model.config)

    def forget_cache(self) -> None:
        """Keeps the turns, but sends them again with the next one."""
        self._cached = self._cached[:, :0]
        self._cache = DynamicCache(config=self._model.config)

    def say(self, text: str, sampling: Sampling, on_text: Callable[[str], None] = _nothing) -> Answer:
        """Answers the user. Raises PromptTooLong, and what `generate` raises; the turn is then undone."""
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self.complete(encode_chat(self._tokenizer, self.messages), sampling, on_text)
        except BaseException:
            self.messages.pop()
            self.forget_cache()
            raise
        self.messages.append({"role": "assistant", "content": answer.text})
        return answer

    def complete(
        self,
        input_ids: torch.Tensor,
        sampling: Sampling,
        on_text: Callable[[str], None] = _nothing,
        on_first_token: Callable[[], None] = _nothing,
    ) -> Answer:
        """Continues token ids `[1, tokens]`; what the cache already holds of them is not sent again."""
        prompt_tokens = input_ids.shape[1]
        room = positions(self._model.config) - prompt_tokens
        if room < 1:
            raise PromptTooLong(
                f"{prompt_tokens} tokens leave no room in the model's {room + prompt_tokens} positions"
            )
        self._keep_common_prefix(input_ids)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        stream = _Stream(self._tokenizer, on_text, on_first_token)
        began = time.perf_counter()
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=min(sampling.max_tokens, room),
            streamer=stream,
            pad_token_id=pad_token(self._tokenizer),
            **{cache_argument(): self._cache},
            **sampling.options(),
        )
        ended = time.perf_counter()
        # The last token was chosen, but never went through the model.
        self._cached = output[:, :-1]
        new = output[0, prompt_tokens:]
        stopped = len(new) > 0 and int(new[-1]) in end_tokens(self._model)
        return Answer(
            text=self._tokenizer.decode(new, skip_special_tokens=True),
            prompt_tokens=prompt_tokens,
            tokens=len(new),
            finish_reason="stop" if stopped else "length",
            first_token_seconds=(stream.first_token or ended) - began,
            seconds=ended - began,
        )

    def _keep_common_prefix(self, input_ids: torch.Tensor) -> None:
        """Rolls the cache back to where the new prompt departs from what it holds."""
        limit = min(self._cached.shape[1], input_ids.shape[1] - 1)
        differs = (self._cached[0, :limit] != input_ids[0, :limit]).nonzero()
        common = int(differs[0]) if len(differs) else limit
        surplus = self._cached.shape[1] - common
        if not surplus:
            return
        try:
            self._cache.crop(-surplus)
            self._cached = self._cached[:, :common]
        except (RuntimeError, ValueError):
            # A layer with a sliding window has dropped what would be needed again.
            self.forget_cache()


def load_tokenizer(name_or_path: str, revision: str | None = None) -> Any:
    """The checkpoint's tokenizer. Raises UnknownModel."""
    checkpoint = Checkpoint.resolve(name_or_path, revision)
    directory = Path(name_or_path)
    if directory.is_dir() and not [*directory.glob("tokenizer*"), *directory.glob("vocab*")]:
        raise UnknownModel(f"{name_or_path} has no tokenizer: put the model's tokenizer.json beside its weights")
    try:
        return AutoTokenizer.from_pretrained(checkpoint.name if revision else name_or_path, revision=revision)
    except Exception as error:
        raise UnknownModel(f"the tokenizer of {name_or_path} cannot be loaded: {error}") from None


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> torch.Tensor:
    """Token ids `[1, tokens]` of a conversation; of its plain text where there is no chat template."""
    if not tokenizer.chat_template:
        return encode_text(tokenizer, "\n".join(message["content"] for message in messages))
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # The template is a program of the model's: e.g. some know no system message.
        raise ConfigError(f"the model's chat template refuses this conversation: {error}") from None
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return ids


def encode_text(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids `[1, tokens]` of plain text."""
    ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
    return ids


def positions(config: Any) -> int:
    """Positions that a model has."""
    return int(getattr(config.get_text_config(decoder=True), "max_position_embeddings", 0) or 2**31)


def end_tokens(model: Any) -> set[int]:
    """Token ids that end a text."""
    ids = model.generation_config.eos_token_id
    return set(ids if isinstance(ids, list) else [] if ids is None else [ids])


def pad_token(tokenizer: Any) -> int:
    """A token id to pad with; the end token's where the tokenizer has none."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)


def cache_argument() -> str:
    """What this version of transformers calls the cache in `generate`."""
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"

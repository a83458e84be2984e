"""Conversations with a split model: prompts, streamed answers, and a cache that all turns share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from split_common.compat.transformers import cache_name
from split_common.errors import PromptTooLong, UnsupportedFeature
from split_common.models.layer_stack import max_positions
from split_device.generation.answers import AnswerFormat, AnswerStream, answer_format
from split_device.generation.bad_words import bad_word_tokens, check_named_tokens
from split_device.generation.call_grammar import call_constraint
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.image_prompts import encode_with_images
from split_device.generation.penalties import OccurrencePenalty
from split_device.generation.settings import Sampling
from split_device.generation.shown_images import ShownImage
from split_device.generation.structured import StructuredOutputs
from split_device.generation.tokenizing import ChatMessage, encode_chat, end_tokens, pad_token
from split_device.generation.tool_calls import AnswerPiece
from split_device.generation.tool_styles import open_thinking
from split_device.models.cache import SessionCacheLayer
from split_device.speculation.names import AUTO, OFF

if TYPE_CHECKING:
    from split_device.generation.constraint import Grammars


@dataclass(frozen=True)
class ChatAnswer:
    """A generated text. Times in seconds; the first token's includes the prompt's prefill."""

    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: str
    first_token_seconds: float
    seconds: float
    #: The id by which logs name the request, and the name that broker and worker log: the first 8 hexadecimal
    #: digits of the session's key. All turns of a conversation share them. Empty if the model is not split.
    request_id: str = ""
    session: str = ""
    #: What the model thought before it answered.
    reasoning: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed. The first token, which waits for the prompt, does not count."""
        return (self.tokens - 1) / (self.seconds - self.first_token_seconds) if self.tokens > 1 else 0.0


def _nothing(_text: str = "") -> None:
    pass


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Passes text on as soon as it is complete, and notes when the first token came. Called by `generate`."""

    def __init__(
        self,
        stream: AnswerStream,
        on_text: Callable[[str], None],
        on_thinking: Callable[[str], None],
        on_first_token: Callable[[], None],
    ) -> None:
        self._stream = stream
        self._on_text = on_text
        self._on_thinking = on_thinking
        self._on_first_token = on_first_token
        self._prompt_came = False
        #: What was passed on.
        self.text = self.reasoning = ""
        #: Time of the first token, by `time.perf_counter`.
        self.first_token: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt at the first call, and new tokens at all others."""
        if not self._prompt_came:
            self._prompt_came = True
            return
        if self.first_token is None:
            self.first_token = time.perf_counter()
            self._on_first_token()
        for token in value.reshape(-1).tolist():
            self._pass_on(self._stream.push(token))

    def end(self) -> None:
        self._pass_on(self._stream.end())

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self._stream.stopped

    def _pass_on(self, piece: AnswerPiece) -> None:
        if piece.reasoning:
            self.reasoning += piece.reasoning
            self._on_thinking(piece.reasoning)
        if piece.text:
            self.text += piece.text
            self._on_text(piece.text)


class _UntilStopped(StoppingCriteria):  # type: ignore[misc]
    """Ends `generate` at a stop text. It is asked after the streamer has been given a token."""

    def __init__(self, streamer: _Streamer) -> None:
        self._streamer = streamer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._streamer.stopped, device=input_ids.device)


class Conversation:
    """A conversation whose turns share one cache, so that only new tokens are sent. Not thread-safe.

    Args:
        model: a split model (or any causal language model of transformers).
        tokenizer: its tokenizer.
        start: messages before the first turn, e.g. a system message.
        template: another chat template, or values for its variables.
        request_id: the id by which logs name it, if the model is split; None for a random one.
        processor: makes prompts with images; None for a model for texts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        start: Sequence[ChatMessage] = (),
        template: ChatTemplate = ChatTemplate(),
        request_id: str | None = None,
        processor: Any = None,
    ) -> None:
        self._processor = processor
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._start = tuple(start)
        self._named = {} if request_id is None else {"request_id": request_id}
        self.reset()

    def reset(self) -> None:
        """Forgets all turns."""
        self.messages: list[ChatMessage] = list(self._start)
        self._shown: list[ShownImage] = []
        self._cached = torch.zeros(1, 0, dtype=torch.long)
        self._cache = DynamicCache(config=self._model.config)

    def forget_cache(self) -> None:
        """Drops the cache: the next turn sends all earlier ones again."""
        self._cached = self._cached[:, :0]
        self._cache = DynamicCache(config=self._model.config)

    def say(
        self,
        text: str,
        sampling: Sampling,
        on_text: Callable[[str], None] = _nothing,
        stop: Sequence[str] = (),
        images: Sequence[Any] = (),
        structured: StructuredOutputs | None = None,
        on_thinking: Callable[[str], None] = _nothing,
    ) -> ChatAnswer:
        """Answers the user, up to a text in `stop`. If it fails, the turn is undone.

        What the model thinks is not part of the text: `on_thinking` gets it. `images`, of Pillow, are shown before
        the text. From then on, each turn sends all earlier ones again. The answer looks as `structured` says.

        Raises:
            PromptTooLong: the conversation fills the model's positions.
            ConfigError: the chat template refuses the conversation.
            ConfigError, UnsupportedFeature: `structured` is refused.
            SplitError: raised by `generate`.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        shown = [*self._shown, *(ShownImage(image, len(messages) - 1) for image in images)]
        try:
            if shown:
                prompt = encode_with_images(self._processor, messages, shown, template=self._template)
                ids, inputs = torch.tensor([prompt]), prompt.images
            else:
                ids, inputs = encode_chat(self._tokenizer, messages, template=self._template), {}
            answer = self.complete(
                ids,
                sampling,
                on_text,
                stop=stop,
                images=inputs,
                structured=structured,
                format_=answer_format(self._tokenizer, self._template),
                on_thinking=on_thinking,
            )
        except BaseException:
            self.forget_cache()
            raise
        thought = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
        messages.append({"role": "assistant", "content": answer.text, **thought})
        # At once, so that Ctrl-C leaves all of the turn or nothing.
        self.messages, self._shown = messages, shown
        return answer

    def complete(
        self,
        input_ids: torch.Tensor,
        sampling: Sampling,
        on_text: Callable[[str], None] = _nothing,
        on_first_token: Callable[[], None] = _nothing,
        stop: Sequence[str] = (),
        images: Mapping[str, torch.Tensor] | None = None,
        structured: StructuredOutputs | None = None,
        format_: AnswerFormat | None = None,
        on_thinking: Callable[[str], None] = _nothing,
    ) -> ChatAnswer:
        """Continues token ids int64 `[1, tokens]`. Tokens that the cache holds already are not sent again.

        What `sampling` leaves open is as in generation_config.json. It ends before a text in `stop`, looks as
        `structured` says, and is read by `format_`, if the tokens are a conversation. With `images`, arguments of
        `generate` that a processor made, all tokens are sent.

        Raises:
            PromptTooLong: the tokens fill the model's positions.
            ConfigError: a value of `sampling` is out of bounds, or names a token that the model does not have.
            ConfigError, UnsupportedFeature: `structured` is refused, or `sampling` names a drafter.
            SplitError: raised by `generate`.
        """
        input_ids = input_ids.to(self._model.device)
        prompt_tokens = input_ids.shape[1]
        sampling = self._settled(sampling, prompt_tokens)
        if images:
            self.forget_cache()
        self._keep_common_prefix(input_ids)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        ends = sampling.ends(end_tokens(self._model, self._tokenizer))
        words = bad_word_tokens(self._tokenizer, sampling.bad_words or ())
        check_named_tokens(self._model, words, [(token,) for token in sampling.logit_bias or ()])
        structured = self._beside_calls(structured, format_)
        processors = self._processors(sampling, structured, prompt_tokens)
        if structured is not None:
            ends = sorted({*(ends or ()), *self._grammars.ends})
        stream = AnswerStream(self._tokenizer, format_, input_ids[0].tolist(), stop)
        streamer = _Streamer(stream, on_text, on_thinking, on_first_token)
        began = time.perf_counter()
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=sampling.max_tokens,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_UntilStopped(streamer)] if stop else []),
            logits_processor=processors,
            eos_token_id=ends,
            pad_token_id=pad_token(self._tokenizer),
            **{cache_name(type(self._model)): self._cache},
            **sampling.options(words),
            **_placed(images or {}, self._model),
            **self._named,
        )
        # The last token was chosen, but never went through the model.
        self._cached = output[:, :-1]
        new = output[0, prompt_tokens:].tolist()
        return self._answer(streamer, prompt_tokens, new, bool(new) and new[-1] in ends, began)

    def _settled(self, sampling: Sampling, prompt_tokens: int) -> Sampling:
        """Settings with the model's defaults, and lengths that fit its positions. Raises as `complete`."""
        if sampling.speculate not in (None, AUTO, OFF):
            raise UnsupportedFeature(
                f"speculate={sampling.speculate!r}: a conversation has no drafters; jobs and a Generator do, and "
                "generate takes prompt_lookup_num_tokens"
            )
        sampling = sampling.checked().resolved(self._model.generation_config)
        limit = max_positions(self._model.config)
        if prompt_tokens >= limit:
            raise PromptTooLong(f"{prompt_tokens} tokens leave no room in the model's {limit} positions")
        most = min(sampling.max_tokens, limit - prompt_tokens)
        least = None if sampling.min_tokens is None else min(sampling.min_tokens, most)
        return dataclasses.replace(sampling, max_tokens=most, min_tokens=least)

    def _beside_calls(
        self, structured: StructuredOutputs | None, format_: AnswerFormat | None
    ) -> StructuredOutputs | None:
        """What an answer has to look like where it may think or call tools before."""
        if structured is None or format_ is None:
            return structured
        thinking = open_thinking(self._template.opening(self._tokenizer))
        return call_constraint(self._tokenizer, format_, structured, thinking[1] if thinking else None)

    def _processors(
        self, sampling: Sampling, structured: StructuredOutputs | None, prompt_tokens: int
    ) -> list[LogitsProcessor]:
        """What changes logits beside transformers' own processors."""
        processors: list[LogitsProcessor] = []
        penalties = sampling.frequency_penalty or 0.0, sampling.presence_penalty or 0.0
        if any(penalties):
            processors.append(OccurrencePenalty(prompt_tokens, *penalties))
        if structured is not None:
            processors.append(self._grammars.processor(structured, prompt_tokens))
        return processors

    def _answer(
        self, streamer: _Streamer, prompt_tokens: int, new: list[int], ended: bool, began: float
    ) -> ChatAnswer:
        """What a call of `generate` gave.

        Args:
            new: the tokens that it chose.
            ended: whether the last one ends an answer.
            began: when it began, by `time.perf_counter`.
        """
        now = time.perf_counter()
        layers = (layer for layer in self._cache.layers if isinstance(layer, SessionCacheLayer))
        identity = next((layer.identity for layer in layers), None)
        return ChatAnswer(
            text=streamer.text,
            prompt_tokens=prompt_tokens,
            tokens=len(new),
            finish_reason="stop" if streamer.stopped or ended else "length",
            first_token_seconds=(streamer.first_token or now) - began,
            seconds=now - began,
            request_id=identity.request_id if identity is not None else "",
            session=identity.label if identity is not None else "",
            reasoning=streamer.reasoning,
        )

    @cached_property
    def _grammars(self) -> Grammars:
        from split_device.generation.constraint import Grammars

        vocabulary = int(self._model.config.get_text_config(decoder=True).vocab_size)
        return Grammars(self._tokenizer, vocabulary, end_tokens(self._model, self._tokenizer))

    def _keep_common_prefix(self, input_ids: torch.Tensor) -> None:
        """Rolls the cache back to where the new prompt differs from it."""
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
            # A layer with a sliding window has dropped states that are needed again.
            self.forget_cache()


def _placed(images: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """A processor's tensors on a model's device, pixels in its dtype."""
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in images.items()
        if name not in ("input_ids", "attention_mask")
    }

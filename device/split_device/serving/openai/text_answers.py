"""Choices of text completions, whole and in pieces."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any

from split_device.serving.choices import Choice, TokenLogprobs


class TextChoice:
    """Writes one choice: the whole of it, or piece after piece.

    Args:
        prompt: makes the piece before the first one, which repeats the prompt; None if it is not repeated.
        prompt_alone: whether nothing else is written, neither text nor tokens of the answer.
    """

    def __init__(
        self, index: int, prompt: Callable[[], Choice] | None = None, *, prompt_alone: bool = False
    ) -> None:
        self._index = index
        self._prompt = prompt
        self._prompt_alone = prompt_alone
        #: Counts the characters that the tokens so far have completed.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def fields(self, piece: Choice) -> dict[str, Any]:
        """A piece, or the whole, as a choice of OpenAI's format."""
        text, logprobs = ("", []) if self._prompt_alone else (piece.text, piece.logprobs)
        if self._prompt is not None:
            prompt, self._prompt = self._prompt(), None
            text = prompt.text + text
            logprobs = None if logprobs is None else [*(prompt.logprobs or ()), *logprobs]
        return {
            "index": self._index,
            "text": text,
            "logprobs": None if piece.logprobs is None else self._logprobs(logprobs or []),
            "finish_reason": "length" if self._prompt_alone and piece.finish_reason else piece.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return {
            "tokens": [_name(token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_by_name(token.top) if token.logprob is not None else None for token in tokens],
            "text_offset": [self._offset_of(token) for token in tokens],
        }

    def _offset_of(self, token: TokenLogprobs) -> int:
        """Where a token begins in the text, in characters; the next token follows it."""
        offset = self._offset
        self._offset += len(self._decoder.decode(token.data))
        return offset


def likeliest(choices: Sequence[Choice], count: int) -> list[int]:
    """Which choices have the highest mean log probability of a token, the highest first; at most `count`."""

    def mean(index: int) -> float:
        values = [token.logprob or 0.0 for token in choices[index].logprobs or ()]
        return sum(values) / max(1, len(values))

    return sorted(range(len(choices)), key=mean, reverse=True)[:count]


def _by_name(tokens: Sequence[TokenLogprobs]) -> dict[str, float | None]:
    """Log probabilities in descending order, by name; of tokens with one name, that of the likeliest."""
    named: dict[str, float | None] = {}
    for token in tokens:
        named.setdefault(_name(token), token.logprob)
    return named


def _name(token: TokenLogprobs) -> str:
    """A token's text; for a part of a character its bytes, as in `bytes:\\xe4\\xbd`."""
    try:
        token.data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)
    return token.text

"""Incremental detokenizing: turns tokens into text as they come, up to a stop string.

The offsets are those of Hugging Face's text-generation-inference (`prefix_offset` and `read_offset`).
`tokenizers.decoders.DecodeStream` works alike and is faster (0.5 µs a token, not 6), but in tokenizers 0.23 it
raises an exception for byte-fallback tokens that are not valid UTF-8, never returns an incomplete character at the
end, and needs a fast tokenizer. Models may generate anything, so it is not used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from split_device.generation.special_tokens import special_tokens

#: Decoders write it in place of bytes that are not a complete character.
_INCOMPLETE = "\ufffd"

#: How many of a prompt's tokens may change the text of an answer that continues it.
CONTINUED = 8


class TextStream:
    """Text of tokens, returned as soon as later tokens cannot change it. Special tokens have no text.

    Args:
        tokenizer: a tokenizer of transformers, fast or not.
        stop: texts at which the stream ends; text that may be the beginning of one is held back. They may hold
            special tokens as these are written. Empty ones have no effect.
        before: tokens that the text continues. They are not part of it, but may change how it begins.
        visible: special tokens that have a text, as they are written.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        before: Sequence[int] = (),
        visible: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = list(before)
        # Tokens before `_read` are text already. Decoding begins at `_from`, because a token's text depends on
        # earlier tokens.
        self._from, self._read = 0, len(before)
        self._search = _StopSearch([text for text in stop if text])
        self._visible = frozenset(visible)
        self._special = special_tokens(tokenizer) if self._search.stops or visible else {}

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._search.found is not None

    @property
    def stopped_by(self) -> str | None:
        """The stop string that has come; None so far."""
        return self._search.found

    def push(self, token: int) -> str:
        """Adds a token. Returns the text that it completes, which may be empty."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        ready = ""
        text = self._new_text()
        if text and not text.endswith(_INCOMPLETE):
            self._from, self._read = self._read, len(self._tokens)
            ready = self._search.push(text)
        if token in self._special and not self.stopped:
            ready += self._search.push(self._special[token], hidden=token not in self._visible)
        return ready

    def end(self) -> str:
        """Ends the stream. Returns the text that was held back."""
        if self.stopped:
            return ""
        return self._search.push(self._new_text()) + self._search.end()

    def _new_text(self) -> str:
        known = self._decode(self._tokens[self._from : self._read])
        return self._decode(self._tokens[self._from :])[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""


class _StopSearch:
    """Finds the first of some stop strings in a text that comes in pieces, and returns what is before it.

    Hidden pieces are searched, and not returned.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        #: The stop string that was found.
        self.found: str | None = None
        #: What may be the beginning of a stop string; `_hidden` says of each character whether it is hidden.
        self._held = ""
        self._hidden: list[bool] = []

    def push(self, text: str, hidden: bool = False) -> str:
        """Adds a piece. Returns the text that is before any stop string."""
        self._held += text
        self._hidden += [hidden] * len(text)
        found = [(at, stop) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.found = min(found)
            return self._release(at)
        return self._release(len(self._held) - max((_overlap(self._held, stop) for stop in self.stops), default=0))

    def end(self) -> str:
        """Returns what was held back, unless a stop string has come."""
        return "" if self.found is not None else self._release(len(self._held))

    def _release(self, size: int) -> str:
        ready = "".join(char for char, hidden in zip(self._held, self._hidden[:size], strict=False) if not hidden)
        self._held, self._hidden = self._held[size:], self._hidden[size:]
        return ready


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of a text that may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)

"""Incremental detokenizing: turns tokens into text as they come, up to a stop text.

The offsets are those of Hugging Face's text-generation-inference (`prefix_offset` and `read_offset`).
`tokenizers.decoders.DecodeStream` works alike and is faster (0.5 µs a token, not 6), but in tokenizers 0.23 it
raises an exception for byte-fallback tokens that are not valid UTF-8, never returns an incomplete character at the
end, and needs a fast tokenizer. Models may generate anything, so it is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Decoders write it in place of bytes that are not a complete character.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Text of tokens, returned as soon as later tokens cannot change it. Special tokens have no text.

    Args:
        tokenizer: a tokenizer of transformers, fast or not.
        stop: texts at which the stream ends; text that may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._tokens: list[int] = []
        # Tokens before `_read` are text already. Decoding begins at `_from`, because a token's text depends on
        # earlier tokens.
        self._from = self._read = 0
        self._held = ""
        #: Whether a stop text has come.
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds a token. Returns the text that it completes, which may be empty."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        text = self._new_text()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._from, self._read = self._read, len(self._tokens)
        return self._pass_on(text)

    def end(self) -> str:
        """Ends the stream. Returns the text that was held back."""
        if self.stopped:
            return ""
        held, self._held = self._held + self._new_text(), ""
        return held

    def _new_text(self) -> str:
        known = self._decode(self._tokens[self._from : self._read])
        return self._decode(self._tokens[self._from :])[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""

    def _pass_on(self, text: str) -> str:
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            keep = min(found)
        else:
            keep = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        ready, self._held = self._held[:keep], self._held[keep:]
        return ready


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of a text that may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)

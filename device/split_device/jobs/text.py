"""Turning tokens into text as they come, up to a text at which it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: What a tokenizer gives for bytes that are no character yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of tokens: passed on as soon as later tokens cannot change it.

    Args:
        tokenizer: of transformers.
        stop: texts at which the stream ends; what could be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._tokens: list[int] = []
        # Text up to `_read` is out; decoding begins at `_from`, since a token's text depends on those before it.
        self._from = self._read = 0
        self._held = ""
        #: Whether one of the texts to stop at has come.
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that a token completes, often none."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        text = self._new_text()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._from, self._read = self._read, len(self._tokens)
        return self._pass_on(text)

    def end(self) -> str:
        """What was held back, since no token follows."""
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
    """Characters at the end of a text that could be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)

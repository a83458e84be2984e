"""Prompt lookup: what followed the latest tokens where the text had them before.

After "Prompt Lookup Decoding" (A. Saxena, 2023): `prompt_lookup_num_tokens` of transformers, `ngram` of vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: Number of latest tokens that must have occurred before: the longest and the shortest match.
LONGEST = 4
SHORTEST = 2


class NgramDrafter:
    """Drafts what followed the latest occurrence of the longest match. A `Drafter`."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        #: For each n-gram that something follows: the index of what followed its latest occurrence.
        self._following: dict[tuple[int, ...], int] = {}
        #: How many tokens are known to follow something. The others are looked at when a draft is asked for.
        self._indexed = 0

    def extend(self, tokens: Sequence[int]) -> None:
        self._tokens += tokens

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        """Does nothing: the text is all that it looks at."""

    def draft(self, limit: int) -> list[int]:
        text = self._tokens
        self._index()
        for length in range(min(LONGEST, len(text)), SHORTEST - 1, -1):
            begin = self._following.get(tuple(text[len(text) - length :]))
            if begin is not None:
                # What reaches the end of the text goes on from its beginning: the text repeats itself.
                period = len(text) - begin
                return [text[begin + index % period] for index in range(limit)]
        return []

    def _index(self) -> None:
        text, end = self._tokens, len(self._tokens)
        for length in range(SHORTEST, LONGEST + 1):
            if (begin := max(length, self._indexed)) < end:
                matches = zip(*(text[begin - length + at : end - length + at] for at in range(length)), strict=True)
                self._following.update(zip(matches, range(begin, end), strict=True))
        self._indexed = end

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

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._following[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        """Does nothing: the text is all that it looks at."""

    def draft(self, limit: int) -> list[int]:
        text = self._tokens
        for length in range(min(LONGEST, len(text)), SHORTEST - 1, -1):
            begin = self._following.get(tuple(text[len(text) - length :]))
            if begin is not None:
                # What reaches the end of the text goes on from its beginning: the text repeats itself.
                period = len(text) - begin
                return [text[begin + index % period] for index in range(limit)]
        return []

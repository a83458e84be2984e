"""Which tokens a text has, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch


class Occurrences:
    """The distinct tokens of a text and the number of times that it has each."""

    def __init__(self, tokens: Sequence[int]) -> None:
        found = Counter(tokens)
        self._slots = {token: slot for slot, token in enumerate(found)}
        self._tokens = torch.tensor([*found], dtype=torch.long)
        self._counts = torch.tensor([*found.values()], dtype=torch.float32)
        self._largest = max(found, default=0)

    def below(self, bound: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The distinct tokens below a bound, int64 `[distinct]`, and how often the text has each, float32."""
        tokens, counts = self._tokens[: len(self._slots)], self._counts[: len(self._slots)]
        if self._largest < bound:
            return tokens, counts
        inside = tokens < bound
        return tokens[inside], counts[inside]

    def add(self, token: int) -> None:
        """Goes on with this token."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._tokens):
            spare = max(16, slot)
            self._tokens = torch.cat([self._tokens, self._tokens.new_zeros(spare)])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(spare)])
        self._tokens[slot] = token
        self._counts[slot] += 1
        self._largest = max(self._largest, token)

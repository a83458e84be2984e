"""What two predictors expect together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch

from split_device.speculation.tree import Predictor

First = TypeVar("First")
Second = TypeVar("Second")


class CombinedPredictor(Generic[First, Second]):
    """Expects what the first one does; what that leaves open, the second one fills. A `Predictor`."""

    def __init__(self, first: Predictor[First], second: Predictor[Second]) -> None:
        self._first, self._second = first, second

    def extend(self, tokens: Sequence[int]) -> None:
        self._first.extend(tokens)
        self._second.extend(tokens)

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        self._first.learn(tokens, logits)
        self._second.learn(tokens, logits)

    def end(self) -> tuple[First, Second]:
        return self._first.end(), self._second.end()

    def after(self, state: tuple[First, Second], token: int) -> tuple[First, Second]:
        return self._first.after(state[0], token), self._second.after(state[1], token)

    def expected(self, state: tuple[First, Second]) -> dict[int, float]:
        chances = dict(self._first.expected(state[0]))
        left = 1 - sum(chances.values())
        for token, chance in self._second.expected(state[1]).items():
            chances[token] = chances.get(token, 0.0) + left * chance
        return chances

"""What a constraint allows: random texts, of tokens that may come next, and texts of the unsplit model."""

from __future__ import annotations

import random
from typing import Any

import torch

from split_device.generation.constraint import GrammarConstraint
from split_device.generation.penalties import ConstraintMask

#: Characters that end what JSON has begun.
_CLOSING = frozenset('"}]')


def walk(constraint: GrammarConstraint, tokenizer: Any, seed: int, length: int = 300) -> str | None:
    """A random text that the constraint allows; None if it is not complete after `length` tokens."""
    source = random.Random(seed)
    tokens: list[int] = []
    while len(tokens) < length:
        if (token := constraint.forced()) is None:
            allowed = constraint.mask().nonzero()[:, 0].tolist()
            token = source.choice(_preferred(tokenizer, allowed, source, len(tokens)))
        constraint.accept(token)
        if constraint.finished:
            return str(tokenizer.decode(tokens))
        tokens.append(token)
    return None


def _preferred(tokenizer: Any, allowed: list[int], source: random.Random, length: int) -> list[int]:
    """Tokens that end something, more often the longer the text is."""
    ends = [token for token in allowed if token == tokenizer.eos_token_id]
    closing = [token for token in allowed if tokenizer.decode([token])[:1] in _CLOSING]
    hurried = source.random() < length / 60
    return (ends or closing or allowed) if hurried else allowed


class ConstraintProcessor(ConstraintMask):
    """A constraint for transformers' `generate`: one sequence, whose prompt has this many tokens.

    The tokens are those of a generator's request with the same constraint.
    """

    def __init__(self, constraint: GrammarConstraint, prompt: int) -> None:
        super().__init__(constraint)
        self._seen = prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores `[1, vocabulary]`, minus infinity for tokens that may not come next."""
        for token in input_ids[0, self._seen :].tolist():
            self.constraint.accept(token)
        self._seen = input_ids.shape[1]
        return super().__call__(input_ids, scores)

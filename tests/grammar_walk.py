"""Random texts that a constraint allows: which tokens may come next is asked, and one of them is taken."""

from __future__ import annotations

import random
from typing import Any

from split_device.generation.constraint import GrammarConstraint

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

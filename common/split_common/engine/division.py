"""Finds out whether tokens may go through layers in parts.

In most layers a token's output depends on the token and those before it, however many go through together. In
some, tokens that go through together also see those after them, or choose keys among all of them. Such layers are
*indivisible*: what went through them together has to go through together wherever it is computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from split_common.engine.forward import Executor
from split_common.engine.layers import LayerRange
from split_common.engine.padding import HALF_TOLERANCE, TOLERANCE
from split_common.engine.sequences import KVSequence, TokenRun

log = logging.getLogger(__name__)

#: How many tokens each of the last parts has. The first part has the others.
_LAST_PARTS = (9, 4, 2, 1, 1)

#: Tokens of the probe beside those that exceed the layers' windows.
_MORE_TOKENS = 27

#: Different states in the probe. Which of several equal ones a mask chooses depends on the number of tokens.
_STATES = 4


@torch.inference_mode()
def is_indivisible(layers: LayerRange, executor: Executor, tokens: int) -> bool:
    """Whether a prompt's output depends on the parts in which it goes through.

    Args:
        layers: the layers.
        executor: runs them.
        tokens: the length of a prompt that exceeds what the layers have of windows.
    """
    tokens = min(tokens + _MORE_TOKENS, layers.stack.max_positions)
    if tokens <= sum(_LAST_PARTS):
        return True
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(_STATES, layers.width, generator=generator)
    states = states[torch.randint(_STATES, (tokens,), generator=generator)]
    whole = append_parts(executor, states, [tokens])
    parts = append_parts(executor, states, [tokens - sum(_LAST_PARTS), *_LAST_PARTS])
    finite = bool(torch.isfinite(whole).all() and torch.isfinite(parts).all())
    differs = ((parts - whole).norm() / whole.norm()).item()
    if not finite or differs <= TOLERANCE.get(layers.dtype, HALF_TOLERANCE):
        return False
    log.info("the output of a prompt in parts differs by %.1e", differs)
    return True


def append_parts(executor: Executor, states: torch.Tensor, parts: Sequence[int]) -> torch.Tensor:
    """Runs a sequence of its own in parts of so many tokens, and frees it.

    Returns:
        Its output, float32 `[tokens, width]`.
    """
    sequence = executor.store.new_sequence()
    try:
        return torch.cat([append_next(executor, sequence, states, count) for count in parts]).float()
    finally:
        sequence.free()


def append_next(executor: Executor, sequence: KVSequence, states: torch.Tensor, count: int) -> torch.Tensor:
    """Appends the next `count` of a sequence's tokens. Returns their output `[count, width]`.

    Args:
        states: of all the sequence's tokens, `[tokens, width]`.
    """
    begin = sequence.length
    run = TokenRun(sequence, states[begin : begin + count], range(begin, begin + count))
    return executor.launch([run]).wait()[0]

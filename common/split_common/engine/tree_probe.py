"""Finds out whether layers take trees: a token's output has to be that of the path to it, run by itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from split_common.engine.forward import Executor
from split_common.engine.sequences import KVSequence, TokenRun
from split_common.engine.trees import depths

log = logging.getLogger(__name__)

#: Tokens before the tree of the probe, the tree, the paths to its leaves, and the tokens after one of these.
PAST = 5
PARENTS = (-1, 0, 0, -1, 1, 2, 5)
PATHS = ((0, 1, 4), (0, 2, 5, 6), (3,))
KEPT = PATHS[1]
LATER = 2


@torch.inference_mode()
def takes_trees(executor: Executor, width: int, tolerance: float) -> bool:
    """Whether an executor's output of a tree agrees with that of each of its paths, and what follows one with that.

    Args:
        executor: runs packed layers over a store that is empty.
        width: of the hidden states.
        tolerance: largest accepted difference, relative to the largest output.
    """
    generator = torch.Generator().manual_seed(0)
    past, tree, later, other = (
        torch.randn(count, width, generator=generator) for count in (PAST, len(PARENTS), LATER, 1)
    )
    try:
        row, neighbour = executor.store.new_sequence(), executor.store.new_sequence()
        _append(executor, row, past)
        _append(executor, neighbour, past)
        copies = [row.fork() for _ in PATHS]
        places = [PAST + depth for depth in depths(PARENTS)]
        runs = [TokenRun(row, tree, places, parents=PARENTS), TokenRun(neighbour, other, [PAST])]
        (output, _) = executor.launch(runs).wait()
        found, wanted = [], []
        for path, copy in zip(PATHS, copies, strict=True):
            found.append(output[list(path)])
            wanted.append(_append(executor, copy, tree[list(path)]))
        row.keep(PAST, KEPT)
        found.append(_append(executor, row, later))
        wanted.append(_append(executor, copies[PATHS.index(KEPT)], later))
    except Exception as error:
        log.info("layers take no trees: %s: %s", type(error).__name__, error)
        return False
    one, two = torch.cat(found).float(), torch.cat(wanted).float()
    differs = ((one - two).abs().max() / two.abs().max()).item()
    if differs < tolerance:
        return True
    log.info("layers take no trees: the output of one differs by %.1e from that of its paths", differs)
    return False


def _append(executor: Executor, sequence: KVSequence, states: torch.Tensor) -> torch.Tensor:
    """The output `[tokens, width]` of tokens that follow the sequence."""
    positions: Sequence[int] = range(sequence.length, sequence.length + len(states))
    run: TokenRun[Any] = TokenRun(sequence, states, positions)
    return executor.launch([run]).wait()[0]

"""Trees: several continuations of a sequence in one step, of which one path stays.

The tokens of a tree follow those of the sequence, each after its parent. A token attends to the sequence and to its
own ancestors, so its output is that of the path to it, as if the other branches were not there. After
"SpecInfer" (arXiv 2305.09781).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class Keeper(Protocol):
    """What tokens are dropped from: a sequence."""

    def keep(self, begin: int, kept: Sequence[int]) -> None:
        """See `KVSequence.keep`."""


@dataclass
class Kept:
    """Which tokens of an earlier step stay. They are kept once, however often a forward is tried.

    Args:
        begin: the index of the first token that `indices` count from.
        indices: ascending; all other tokens from `begin` on are dropped.
    """

    begin: int
    indices: Sequence[int]
    done: bool = False

    def apply(self, sequence: Keeper) -> None:
        """Drops the others, unless that was done."""
        if not self.done:
            sequence.keep(self.begin, self.indices)
            self.done = True


def is_chain(parents: Sequence[int]) -> bool:
    """Whether each token follows the one before it."""
    return all(parent == index - 1 for index, parent in enumerate(parents))


def is_tree(parents: Sequence[int]) -> bool:
    """Whether each token's parent is a token before it, or -1 for the sequence."""
    return all(-1 <= parent < index for index, parent in enumerate(parents))


def is_path(kept: Sequence[int]) -> bool:
    """Whether indices ascend, so that tokens can be moved to the front one after the other."""
    return all(earlier < later for earlier, later in zip([-1, *kept], kept, strict=False))


def in_place(kept: Sequence[int]) -> int:
    """How many indices of a path are at the front where they were: their tokens need not be moved."""
    return next((place for place, index in enumerate(kept) if place != index), len(kept))


def depths(parents: Sequence[int]) -> list[int]:
    """How many ancestors in the tree each token has: its position after the sequence."""
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent < 0 else found[parent] + 1)
    return found


def seen_in_tree(parents: Sequence[int], past: int, window: int | None) -> torch.Tensor:
    """Which keys each token attends to, bool `[tokens, past + tokens]`.

    Args:
        past: number of keys before the tree, those of the sequence's last tokens.
        window: how many tokens each token attends to, including itself; None for all.
    """
    tokens = len(parents)
    ancestors = torch.eye(tokens, dtype=torch.bool)
    for index, parent in enumerate(parents):
        if parent >= 0:
            ancestors[index] |= ancestors[parent]
    seen = torch.cat([torch.ones(tokens, past, dtype=torch.bool), ancestors], 1)
    if window is not None:
        places = torch.tensor(depths(parents))
        keys = torch.cat([torch.arange(-past, 0), places])
        seen &= places[:, None] - keys[None] < window
    return seen

"""What drafts tokens: the interface of all drafters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from split_device.speculation.tree import DraftTree


class Drafter(Protocol):
    """Guesses the next tokens of one request. The generator's thread calls it.

    A guess costs time at most: only tokens that the model itself chooses are kept.
    """

    def extend(self, tokens: Sequence[int]) -> None:
        """Goes on after these tokens of the text: first those of the prompt, then what was generated."""

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        """Takes what the model expects after each of some tokens, also of drafts that it did not keep.

        Args:
            tokens: the last one of the text, and those of a draft.
            logits: float32 `[tokens, vocabulary]`, which followed each of them, before any logits processor. It is
                valid during the call only, and must not be changed.
        """

    def draft(self, limit: int) -> list[int]:
        """At most `limit` tokens that may follow the text, in order; none if nothing is likely to."""


@runtime_checkable
class TreeDrafter(Drafter, Protocol):
    """A drafter that knows several continuations."""

    def draft_tree(self, budget: int) -> DraftTree:
        """At most `budget` tokens in several continuations."""

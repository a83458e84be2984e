"""What the engine runs, whichever way it keeps keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class Row(Protocol):
    """The keys and values of one sequence."""

    @property
    def length(self) -> int:
        """Its tokens."""

    def truncate(self, tokens: int) -> None:
        """Cuts it back to its first `tokens` tokens."""

    def fork(self) -> Row:
        """A row with the same tokens."""

    def free(self) -> None:
        """Gives its memory back."""


@dataclass(frozen=True)
class Run:
    """Tokens to append to a row: hidden states `[tokens, width]` and their rotary positions."""

    row: Row
    states: torch.Tensor
    positions: Sequence[int]


class Store(Protocol):
    """Makes rows, and knows how much room is left."""

    def new_row(self) -> Row: ...

    def cost(self, row: Row, tokens: int) -> int:
        """What appending tokens to a row takes, in units of `free`."""

    @property
    def free(self) -> int:
        """Memory that is left: pages, or tokens where there are none."""

    @property
    def free_tokens(self) -> int:
        """Tokens that there is memory for."""

    @property
    def capacity(self) -> int:
        """Tokens that there was memory for at the start."""

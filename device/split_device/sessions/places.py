"""Where tokens are: their positions, on one axis or several, and which of the tokens after them they attend to.

Places are int64 tensors. Those of a model for texts are positions, `[..., tokens]`. Those of a model that sees
images are `[..., tokens, fields]`: the positions on each axis, and then how many of the tokens after it a token
attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from split_common.engine.sequences import after_spans
from split_common.errors import UnsupportedFeature
from split_common.protocol import payloads


@dataclass(frozen=True)
class PlacedRun:
    """Tokens to append to one row of a session."""

    row: int
    #: Cache length of the row before the run.
    start: int
    #: `[tokens]` or `[tokens, fields]`.
    places: torch.Tensor
    #: The token of the run that each one follows, -1 for the row's last one before it; empty if it is no tree.
    parents: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.places)

    @property
    def positions(self) -> torch.Tensor:
        """The positions on the first axis, `[tokens]`."""
        return first_axis(self.places, 1)

    def part(self, begin: int, end: int) -> PlacedRun:
        """Some of its tokens; all of them, if it is a tree."""
        return PlacedRun(self.row, self.start + begin, self.places[begin:end], self.parents)

    def whole(self, end: int) -> int:
        """The least number of tokens from `end` on, after which the run may be cut."""
        if self.parents:
            return len(self)
        if self.places.ndim == 1 or end >= len(self):
            return min(end, len(self))
        return after_spans(self._spans(), end)

    def run(self) -> payloads.Run:
        """What travels of each run."""
        return payloads.Run(self.row, self.start, self.positions.tolist())

    def axes(self) -> list[int]:
        """The positions on the further axes, one axis after the other; empty if all axes agree."""
        if self.places.ndim == 1:
            return []
        further = self.places[:, 1:-1].T
        return [] if bool((further == self.positions).all()) else further.flatten().tolist()

    def spans(self) -> list[payloads.Span]:
        """The tokens that attend to each other both ways."""
        if self.places.ndim == 1:
            return []
        return [payloads.Span(self.row, self.start + first, last - first) for first, last in self._spans()]

    def _spans(self) -> list[tuple[int, int]]:
        return spans_of(self.places[:, -1].tolist())


def spans_of(ahead: Sequence[int]) -> list[tuple[int, int]]:
    """Begin and end of the tokens that attend to each other both ways.

    Args:
        ahead: how many of the tokens after it each token attends to.
    """
    spans = []
    index = 0
    while index < len(ahead):
        if ahead[index]:
            spans.append((index, index + ahead[index] + 1))
        index += ahead[index] + 1
    return spans


def distinct_axes(positions: torch.Tensor, axes: int) -> torch.Tensor:
    """Position ids that a model's layers are given, as `[axes, batch, tokens]`, or `[batch, tokens]` if axes agree.

    Args:
        positions: `[batch, tokens]`, or the same for each axis, possibly after those of the text.
        axes: how many axes the layers know.

    Raises:
        UnsupportedFeature: the shape is another one.
    """
    if positions.ndim == 3 and len(positions) == axes + 1:
        # The first one are those of the text, for masks alone.
        positions = positions[1:]
    if positions.ndim == 3 and bool((positions == positions[:1]).all()):
        positions = positions[0]
    if positions.ndim != 2 and (positions.ndim != 3 or len(positions) != axes):
        raise UnsupportedFeature(
            f"position ids of shape {tuple(positions.shape)} do not fit: expected one axis, or {axes}"
        )
    return positions


def first_axis(places: torch.Tensor, dimensions: int) -> torch.Tensor:
    """The positions on the first axis, of places whose tokens are in `dimensions` dimensions."""
    return places if places.ndim == dimensions else places[..., 0]

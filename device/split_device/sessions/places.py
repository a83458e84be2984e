"""Where tokens are: their positions, on one axis or several, and which of the tokens after them they attend to.

Places are int64 tensors. Those of a model for texts are positions, `[..., tokens]`. Those of a model that sees
images are `[..., tokens, fields]`: the positions on each axis, and then how many of the tokens after it a token
attends to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from split_common.protocol import payloads


@dataclass(frozen=True)
class PlacedRun:
    """Tokens to append to one row of a session."""

    row: int
    #: Cache length of the row before the run.
    start: int
    #: `[tokens]` or `[tokens, fields]`.
    places: torch.Tensor

    def __len__(self) -> int:
        return len(self.places)

    @property
    def positions(self) -> torch.Tensor:
        """The positions on the first axis, `[tokens]`."""
        return first_axis(self.places, 1)

    def part(self, begin: int, end: int) -> PlacedRun:
        """Some of its tokens."""
        return PlacedRun(self.row, self.start + begin, self.places[begin:end])

    def whole(self, end: int) -> int:
        """The least number of tokens from `end` on, after which the run may be cut."""
        if self.places.ndim == 1 or end >= len(self):
            return min(end, len(self))
        return max([end, *(last for first, last in self._spans() if first < end < last)])

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
        ahead = self.places[:, -1].tolist()
        spans = []
        index = 0
        while index < len(ahead):
            if ahead[index]:
                spans.append((index, index + ahead[index] + 1))
            index += ahead[index] + 1
        return spans


def first_axis(places: torch.Tensor, dimensions: int) -> torch.Tensor:
    """The positions on the first axis, of places whose tokens are in `dimensions` dimensions."""
    return places if places.ndim == dimensions else places[..., 0]

"""Trees on their way: the tokens of a session's last step, and which of them stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from split_common.engine.trees import in_place


@dataclass
class Branches:
    """What a worker has of the last step, and has not been told of it. One thread at a time uses it."""

    #: Of the tokens before the next step, those that stay at the worker, if others do not: ascending indices,
    #: counted from the length of the session minus their number. Empty if the worker has the session's tokens.
    kept: Sequence[int] = ()
    #: Length of the session after the last step, hidden states `[batch, tokens, width]` of that and their places.
    _end: int = 0
    _hidden: torch.Tensor = field(default_factory=lambda: torch.empty(1, 0, 0))
    _places: torch.Tensor = field(default_factory=lambda: torch.empty(1, 0))

    def stepped(self, end: int, hidden: torch.Tensor, places: torch.Tensor) -> None:
        """Notes a step that has run, after which the session has `end` tokens."""
        self._end, self._hidden, self._places = end, hidden, places

    def choose(self, begin: int, kept: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Notes which tokens from index `begin` on stay. Returns their states and places, as in `stepped`."""
        first = begin - (self._end - self._hidden.shape[1])
        chosen = [first + index for index in kept]
        self._end = begin + len(kept)
        self.kept = _unless_in_place(kept)
        return self._hidden[:, chosen], self._places[:, chosen]

    def crop(self, length: int) -> None:
        """The session is cut back to so many tokens."""
        if self.kept and length < self._end:
            self.kept = _unless_in_place(self.kept[: max(0, len(self.kept) - (self._end - length))])
            self._end = length

    def settled(self, length: int) -> int:
        """How many of a session's tokens, of which there are `length`, the worker holds in their places."""
        return length - len(self.kept) + in_place(self.kept)


def _unless_in_place(kept: Sequence[int]) -> Sequence[int]:
    """Indices that ascend; none if they are the first ones, so that cutting off the others is enough."""
    return tuple(kept) if in_place(kept) < len(kept) else ()

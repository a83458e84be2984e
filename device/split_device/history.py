"""What a session has sent: enough to fill another worker's KV cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from split_common import wire


class History:
    """Hidden states and positions of a batch's cached columns, padding included.

    The end-to-end argument: no queue and no worker promises to lose nothing, so the device does.
    """

    def __init__(self) -> None:
        self._length = 0
        #: Where the calls ended that appended columns.
        self._ends: list[int] = []
        self._states = torch.empty(0, 0, 0)
        self._positions = torch.empty(0, 0, dtype=torch.long)

    def append(self, states: torch.Tensor, positions: torch.Tensor) -> None:
        """Adds columns: states `[batch, columns, width]` and positions `[batch, columns]`."""
        end = self._length + states.shape[1]
        if not self._length:
            self._states, self._positions = states.detach().clone(), positions.clone()
        else:
            if end > self._states.shape[1]:
                self._states, self._positions = _grown(self._states, 2 * end), _grown(self._positions, 2 * end)
            self._states[:, self._length : end] = states
            self._positions[:, self._length : end] = positions
        self._length = end
        self._ends.append(end)

    def crop(self, columns: int) -> None:
        """Keeps the first columns."""
        self._length = columns
        self._ends = [end for end in self._ends if end <= columns]

    def select(self, rows: list[int]) -> None:
        """Row i becomes what row `rows[i]` was."""
        self._states = self._states[rows]
        self._positions = self._positions[rows]

    def clone(self) -> History:
        twin = History()
        twin._length, twin._ends = self._length, list(self._ends)
        twin._states, twin._positions = self._states.clone(), self._positions.clone()
        return twin

    def replay(self, columns: torch.Tensor, by_call: bool) -> Iterator[tuple[list[wire.Row], torch.Tensor]]:
        """The runs that make the cache anew, and their states `[tokens, width]`.

        Args:
            columns: which columns hold tokens, bool `[batch, columns]`.
            by_call: whether to keep apart what was appended in several calls, in order.
        """
        ends = [end for end in self._ends if end < self._length] if by_call else []
        begin = 0
        for end in [*ends, self._length]:
            mine = columns[:, begin:end]
            starts = columns[:, :begin].sum(1).tolist()
            rows = [
                wire.Row(row, starts[row], self._positions[row, begin:end][kept].tolist())
                for row, kept in enumerate(mine)
                if bool(kept.any())
            ]
            if rows:
                yield rows, self._states[:, begin:end][mine]
            begin = end


def _grown(buffer: torch.Tensor, columns: int) -> torch.Tensor:
    larger = buffer.new_zeros(buffer.shape[0], columns, *buffer.shape[2:])
    larger[:, : buffer.shape[1]] = buffer
    return larger

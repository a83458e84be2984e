"""What a session has sent: enough to fill another worker's KV cache.

The end-to-end argument: no queue and no worker promises to lose nothing, so the device does. Most of a long history
lies in an encrypted temporary file.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from split_common.errors import AuthenticationError, HistoryLost
from split_common.models.tensors import raw_bytes
from split_common.protocol import payloads
from split_device.sessions.connection import HISTORY_MEMORY
from split_device.sessions.spill import SpillFile

log = logging.getLogger(__name__)

#: Most bytes of hidden states that are spilled and read back together; one column may have more.
BLOCK_BYTES = 1024 * 1024


class Block:
    """Hidden states `[rows, columns, width]` and positions `[rows, columns]` that no longer change.

    In memory or spilled. Copies of a history share its blocks.
    """

    def __init__(self, states: torch.Tensor, positions: torch.Tensor) -> None:
        self.positions = positions
        self._states: torch.Tensor | None = states
        self._shape, self._dtype = states.shape, states.dtype
        #: Bytes of one row's column.
        self.token_bytes = states.shape[2] * states.element_size()
        self._spilled: tuple[SpillFile, list[int]] | None = None

    @property
    def resident(self) -> int:
        """Bytes of states in memory."""
        return self._states.nbytes if self._states is not None else 0

    @property
    def states(self) -> torch.Tensor:
        """Raises OSError or AuthenticationError when spilled states cannot be read back as they were."""
        if (states := self._states) is not None:
            return states
        assert self._spilled is not None
        file, slots = self._spilled
        return torch.frombuffer(file.read(slots), dtype=self._dtype).view(self._shape)

    def spill(self, file: SpillFile) -> None:
        """Raises OSError; the states then stay in memory."""
        if self._states is not None:
            self._spilled = file, file.write(raw_bytes(self._states))
            self._states = None

    def __del__(self) -> None:
        if self._spilled is not None:
            file, slots = self._spilled
            file.release(slots)


@dataclass(frozen=True)
class BlockView:
    """The first columns of a block; row i of the session is the block's row `rows[i]`."""

    block: Block
    rows: list[int]
    columns: int

    @property
    def size(self) -> int:
        """Bytes of states, each row counted, though rows may share a row of the block."""
        return len(self.rows) * self.columns * self.block.token_bytes

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """States `[rows, columns, width]` and positions `[rows, columns]`."""
        states, positions = self.block.states[:, : self.columns], self.block.positions[:, : self.columns]
        if self.rows == list(range(len(states))):
            return states, positions
        return states[self.rows], positions[self.rows]


class History:
    """Hidden states and positions of a batch's cached columns, padding included.

    Kept as a list of parts, so that cropping, reordering and copying move no states. Neighbours are merged while
    they are small, which keeps the list short.

    Args:
        memory: bytes of states to keep in memory, besides those of the last block.
    """

    def __init__(self, memory: int = HISTORY_MEMORY) -> None:
        self._memory = memory
        self._length = 0
        #: The length after each call that appended columns, and the largest position of each.
        self._ends: list[int] = []
        self._horizons: list[int] = []
        self._parts: list[BlockView] = []
        self._file: SpillFile | None = None
        self._lost: HistoryLost | None = None

    @property
    def resident(self) -> int:
        """Bytes of states in memory."""
        return sum(part.block.resident for part in self._parts)

    def append(self, states: torch.Tensor, positions: torch.Tensor) -> None:
        """Adds columns: states `[batch, columns, width]` and positions `[batch, columns]`.

        Never fails: if the history cannot be kept any longer, `replay` will say so.
        """
        self._length += states.shape[1]
        self._ends.append(self._length)
        self._horizons.append(int(positions.max()))
        if self._lost is not None:
            return
        states, positions = states.detach().cpu(), positions.cpu()
        at_once = max(1, BLOCK_BYTES // max(1, states[:, :1].nbytes))
        for piece, places in zip(torch.split(states, at_once, 1), torch.split(positions, at_once, 1), strict=True):
            self._parts.append(_part(piece.clone(), places.clone()))
            self._merge()
            if self._parts[-1].size > BLOCK_BYTES // 2:
                self._spill()

    def crop(self, columns: int) -> None:
        """Keeps the first columns."""
        calls = bisect.bisect_left(self._ends, columns) + (columns > 0)
        left = self._length - columns
        del self._ends[calls:], self._horizons[calls:]
        if left > 0:
            self._length = columns
            self._ends[-1:] = [columns] if columns else []
        while self._parts and left > 0:
            last = self._parts.pop()
            if last.columns > left:
                self._parts.append(replace(last, columns=last.columns - left))
            left -= last.columns

    def select(self, rows: list[int]) -> None:
        """Row i becomes what row `rows[i]` was."""
        self._parts = [replace(part, rows=[part.rows[row] for row in rows]) for part in self._parts]

    def clone(self) -> History:
        twin = History(self._memory)
        twin._length, twin._parts = self._length, list(self._parts)
        twin._ends, twin._horizons = list(self._ends), list(self._horizons)
        twin._file, twin._lost = self._file, self._lost
        return twin

    def replay(
        self, columns: torch.Tensor, by_call: bool
    ) -> Iterator[tuple[list[payloads.Run], torch.Tensor, int | None]]:
        """The runs that rebuild the cache, their states `[tokens, width]`, and their call's largest position.

        Args:
            columns: which columns hold tokens, bool `[batch, columns]`.
            by_call: whether to yield what was appended by each call as a whole; if not, the position is None.

        Raises:
            HistoryLost: it could not be kept, or cannot be read back.
        """
        if self._lost is not None:
            raise self._lost
        begin = done = call = 0
        pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
        for part in self._parts:
            try:
                states, positions = part.read()
            except (OSError, AuthenticationError) as error:
                raise HistoryLost(f"the session's spilled history cannot be read back: {error}") from None
            offset, end = done, done + part.columns
            while done < end:
                stop = min(end, self._ends[call]) if by_call else end
                here = slice(done - offset, stop - offset)
                pieces.append((states[:, here], positions[:, here]))
                done = stop
                if by_call and stop < self._ends[call]:
                    break
                if runs := _runs(columns, begin, torch.cat([places for _, places in pieces], 1)):
                    packed = torch.cat([piece for piece, _ in pieces], 1)[columns[:, begin:stop]]
                    yield runs, packed, self._horizons[call] if by_call else None
                begin, pieces, call = stop, [], call + 1

    def _merge(self) -> None:
        """Merges the last parts while they are of similar size, so that each state is copied only a few times."""
        while len(self._parts) > 1:
            one, two = self._parts[-2:]
            if 2 * two.size < one.size or one.size + two.size > BLOCK_BYTES:
                break
            if not (one.block.resident and two.block.resident):
                break
            (first, before), (second, after) = one.read(), two.read()
            self._parts[-2:] = [_part(torch.cat([first, second], 1), torch.cat([before, after], 1))]

    def _spill(self) -> None:
        """Spills the oldest parts above the limit; if there is no room for them, the history is lost."""
        excess = self.resident - self._memory
        try:
            for part in self._parts[:-1]:
                if excess <= 0:
                    break
                self._file = self._file or SpillFile()
                excess -= part.block.resident
                part.block.spill(self._file)
        except OSError as error:
            self._lost = HistoryLost(
                f"the session's history could not be spilled to a temporary file ({error.strerror or error}), so "
                "that it cannot go on at another worker: make room, set TMPDIR to a directory with more of it, or "
                "raise history_memory (--history-memory)"
            )
            self._parts, self._file = [], None
            log.warning("%s", self._lost)


def _part(states: torch.Tensor, positions: torch.Tensor) -> BlockView:
    return BlockView(Block(states, positions), list(range(states.shape[0])), states.shape[1])


def _runs(columns: torch.Tensor, begin: int, positions: torch.Tensor) -> list[payloads.Run]:
    """The runs of tokens in the columns from `begin` on whose positions `[batch, columns]` are given."""
    mine = columns[:, begin : begin + positions.shape[1]]
    starts = columns[:, :begin].sum(1).tolist()
    return [
        payloads.Run(row, starts[row], positions[row][kept].tolist())
        for row, kept in enumerate(mine)
        if bool(kept.any())
    ]

"""The history of a session: the hidden states that fill another worker's KV cache.

By the end-to-end argument, the device keeps it: neither the queue nor a worker promises to lose nothing. Most of a
long history lies in an encrypted temporary file.
"""

from __future__ import annotations

import bisect
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from split_common.errors import AuthenticationError, HistoryLost
from split_common.models.tensors import raw_bytes
from split_device.sessions.connection import HISTORY_MEMORY
from split_device.sessions.places import PlacedRun, first_axis
from split_device.sessions.spill import SpillFile

log = logging.getLogger(__name__)

#: Most bytes of hidden states that are spilled and read back together; one column may have more.
BLOCK_BYTES = 1024 * 1024


class Block:
    """Hidden states `[rows, columns, width]` and places `[rows, columns, ...]` that no longer change.

    In memory or spilled. Copies of a history share its blocks. Any thread may use it.
    """

    def __init__(self, states: torch.Tensor, positions: torch.Tensor) -> None:
        self.positions = positions
        self._states: torch.Tensor | None = states
        self._shape, self._dtype = states.shape, states.dtype
        #: Bytes of one column in one row.
        self.token_bytes = states.shape[2] * states.element_size()
        self._spilled: tuple[SpillFile, list[int]] | None = None
        self._lock = threading.Lock()

    @property
    def resident(self) -> int:
        """Bytes of states in memory."""
        return states.nbytes if (states := self._states) is not None else 0

    @property
    def states(self) -> torch.Tensor:
        """The states. Raises OSError or AuthenticationError if spilled states cannot be read back unchanged."""
        if (states := self._states) is not None:
            return states
        assert self._spilled is not None
        file, slots = self._spilled
        return torch.frombuffer(file.read(slots), dtype=self._dtype).view(self._shape)

    def spill(self, file: SpillFile) -> None:
        """Moves the states to a file. Raises OSError if that fails; they then stay in memory."""
        with self._lock:
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
        """Bytes of the states of all rows; rows that share a row of the block count once each."""
        return len(self.rows) * self.columns * self.block.token_bytes

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """States `[rows, columns, width]` and places `[rows, columns, ...]`. Raises what `Block.states` raises."""
        states, positions = self.block.states[:, : self.columns], self.block.positions[:, : self.columns]
        if self.rows == list(range(len(states))):
            return states, positions
        return states[self.rows], positions[self.rows]


class History:
    """Hidden states and places (`split_device.sessions.places`) of a batch's cached columns, padding included.

    It is a list of parts, so that cropping, reordering and copying move no states. Small neighbours are merged,
    which keeps the list short. Not thread-safe.

    Args:
        memory: bytes of states to keep in memory, not counting the last block.
    """

    def __init__(self, memory: int = HISTORY_MEMORY) -> None:
        self._memory = memory
        self._length = 0
        #: For each call that appended columns, the length after it and its largest position.
        self._call_ends: list[int] = []
        self._horizons: list[int] = []
        self._parts: list[BlockView] = []
        self._file: SpillFile | None = None
        self._lost: HistoryLost | None = None
        # Whether tokens were cut off that went through together with others which are still there.
        self._call_was_cut = False

    @property
    def resident(self) -> int:
        """Bytes of states in memory."""
        return sum(part.block.resident for part in self._parts)

    def append(self, states: torch.Tensor, positions: torch.Tensor) -> None:
        """Adds columns: states `[batch, columns, width]` and places `[batch, columns, ...]`.

        Never fails: if the history can no longer be kept, `replay` raises HistoryLost.
        """
        self._length += states.shape[1]
        self._call_ends.append(self._length)
        self._horizons.append(int(first_axis(positions, 2).max()))
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
        """Keeps the first `columns` columns."""
        calls = bisect.bisect_left(self._call_ends, columns) + (columns > 0)
        surplus = self._length - columns
        if surplus > 0 and calls and self._call_ends[calls - 1] > columns:
            self._call_was_cut = True
        del self._call_ends[calls:], self._horizons[calls:]
        if surplus > 0:
            self._length = columns
            self._call_ends[-1:] = [columns] if columns else []
        while self._parts and surplus > 0:
            last = self._parts.pop()
            if last.columns > surplus:
                self._parts.append(replace(last, columns=last.columns - surplus))
            surplus -= last.columns
        if self._parts and _is_open(self._parts[-1].block.positions[:, : self._parts[-1].columns]):
            self._lost = HistoryLost(
                "the session was cut back into an image whose tokens attend both ways, so it cannot continue on "
                "another worker"
            )

    def replace(self, columns: int, states: torch.Tensor, positions: torch.Tensor) -> None:
        """Keeps the first `columns` columns, and adds others as `append` does, if there are any."""
        self.crop(columns)
        if states.shape[1]:
            self.append(states, positions)

    def select(self, rows: list[int]) -> None:
        """Row i becomes what row `rows[i]` was."""
        self._parts = [replace(part, rows=[part.rows[row] for row in rows]) for part in self._parts]

    def clone(self) -> History:
        copy = History(self._memory)
        copy._length, copy._parts = self._length, list(self._parts)
        copy._call_ends, copy._horizons = list(self._call_ends), list(self._horizons)
        copy._file, copy._lost, copy._call_was_cut = self._file, self._lost, self._call_was_cut
        return copy

    @property
    def is_lost(self) -> bool:
        """Whether it could not be kept."""
        return self._lost is not None

    def fork(self, columns: int) -> History:
        """A copy of the first `columns` columns, for another thread: it spills to a file of its own."""
        copy = self.clone()
        copy._file = None
        copy.crop(columns)
        return copy

    def replay(
        self, columns: torch.Tensor, by_call: bool, indivisible: bool = False
    ) -> Iterator[tuple[list[PlacedRun], torch.Tensor, int | None]]:
        """The runs that rebuild the cache, their states `[tokens, width]`, and their call's largest position.

        Unless they are asked for by call, all but the last ones have as many columns as a block, whatever calls
        have appended them: their sizes show how long the text is, and not of which steps it was made.

        Args:
            columns: which columns hold tokens and not padding, bool `[batch, columns]`.
            by_call: whether to yield the columns of each call together; if not, the position is None.
            indivisible: whether a call whose last columns were cut off cannot be rebuilt.

        Raises:
            HistoryLost: the history could not be kept, or cannot be read back.
        """
        if self._lost is not None:
            raise self._lost
        if indivisible and self._call_was_cut:
            raise HistoryLost(
                "the session was cut back into tokens that went through its layers together, so it cannot continue "
                "on another worker"
            )
        begin = done = call = 0
        pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
        for part in self._parts:
            try:
                states, positions = part.read()
            except (OSError, AuthenticationError) as error:
                raise HistoryLost(f"the session's spilled history cannot be read back: {error}") from None
            offset, end = done, done + part.columns
            most = max(1, BLOCK_BYTES // max(1, part.size // part.columns))
            while done < end:
                if by_call:
                    whole = self._call_ends[call]
                else:
                    whole = min(self._length, begin + most) if done - begin < most else end
                stop = min(end, whole)
                here = slice(done - offset, stop - offset)
                pieces.append((states[:, here], positions[:, here]))
                done = stop
                if stop < whole or _is_open(positions[:, here]):
                    continue
                if runs := _runs(columns, begin, torch.cat([places for _, places in pieces], 1)):
                    packed = torch.cat([piece for piece, _ in pieces], 1)[columns[:, begin:stop]]
                    yield runs, packed, self._horizons[call] if by_call else None
                begin, pieces, call = stop, [], call + 1

    def _merge(self) -> None:
        """Merges the last parts while their sizes are similar, so that each state is copied only a few times."""
        while len(self._parts) > 1:
            one, two = self._parts[-2:]
            if 2 * two.size < one.size or one.size + two.size > BLOCK_BYTES:
                break
            if not (one.block.resident and two.block.resident):
                break
            (first, before), (second, after) = one.read(), two.read()
            self._parts[-2:] = [_part(torch.cat([first, second], 1), torch.cat([before, after], 1))]

    def _spill(self) -> None:
        """Spills the oldest parts above the limit. If the disk is full, the history is lost."""
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
                "the session cannot continue on another worker: free disk space, set TMPDIR to a larger directory, "
                "or raise history_memory (--history-memory)"
            )
            self._parts, self._file = [], None
            log.warning("%s", self._lost)


def _part(states: torch.Tensor, positions: torch.Tensor) -> BlockView:
    return BlockView(Block(states, positions), list(range(states.shape[0])), states.shape[1])


def _is_open(places: torch.Tensor) -> bool:
    """Whether the last of these columns attends to later ones."""
    return places.ndim == 3 and bool(places[:, -1, -1].any())


def _runs(columns: torch.Tensor, begin: int, positions: torch.Tensor) -> list[PlacedRun]:
    """The runs of tokens in columns from `begin` on, given their places `[batch, columns, ...]`."""
    mine = columns[:, begin : begin + positions.shape[1]]
    starts = columns[:, :begin].sum(1).tolist()
    return [PlacedRun(row, starts[row], positions[row][kept]) for row, kept in enumerate(mine) if bool(kept.any())]

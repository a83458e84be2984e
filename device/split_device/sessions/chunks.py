"""Steps that are too long for one message are cut into chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from split_common.errors import Malformed
from split_common.models.tensors import from_bytes
from split_common.protocol import payloads


@dataclass(frozen=True)
class Chunk:
    """Runs of tokens that travel in one message, and their states `[tokens, width]`."""

    rows: list[payloads.Run]
    states: torch.Tensor
    #: Whose output counts, bool `[tokens]`; None for all.
    own: torch.Tensor | None = None

    def output(self, reply: payloads.AnyReply, data: memoryview) -> torch.Tensor:
        """Raises Malformed or NonFinite for an answer to something else."""
        if not isinstance(reply, payloads.Result) or (reply.tokens, reply.width) != self.states.shape:
            raise Malformed(f"the worker returned no states of the shape {tuple(self.states.shape)}")
        output = from_bytes(data, reply.dtype, reply.tokens, reply.width)
        return output if self.own is None else output[self.own]


def cut(rows: list[payloads.Run], packed: torch.Tensor, limit: int, horizon: int | None = None) -> list[Chunk]:
    """Cuts runs so that no chunk has more than `limit` tokens.

    Where positions interact, the worker must see the largest one of the call, `horizon`, in every run: a run that
    ends below it gets one more token there. Its output is dropped, and the row's next run cuts it off.
    """
    chunks = []
    begin = 0
    for runs in _runs(rows, limit):
        lengths = [len(run.positions) for run in runs]
        states = packed[begin : begin + sum(lengths)]
        begin += sum(lengths)
        short = [horizon is not None and max(run.positions) < horizon for run in runs]
        if horizon is None or not any(short):
            chunks.append(Chunk(runs, states))
            continue
        pieces, own, extended = [], [], []
        for run, part, extra in zip(runs, torch.split(states, lengths), short, strict=True):
            pieces += [part, part[-1:]] if extra else [part]
            own += [True] * len(part) + [False] * extra
            extended.append(payloads.Run(run.row, run.start, [*run.positions, *[horizon] * extra]))
        chunks.append(Chunk(extended, torch.cat(pieces), torch.tensor(own)))
    return chunks


def _runs(rows: list[payloads.Run], limit: int) -> list[list[payloads.Run]]:
    chunks: list[list[payloads.Run]] = [[]]
    room = limit
    for row in rows:
        done = 0
        while done < len(row.positions):
            if not room:
                chunks.append([])
                room = limit
            part = row.positions[done : done + room]
            chunks[-1].append(payloads.Run(row.row, row.start + done, part))
            done += len(part)
            room -= len(part)
    return chunks


#: A chunk and its states' bytes.
ChunkRequest = tuple[Chunk, memoryview]

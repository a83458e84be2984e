"""Cuts steps that are too long for one message into chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from split_common.errors import Malformed
from split_common.models.tensors import from_bytes
from split_common.protocol import payloads


@dataclass(frozen=True)
class Chunk:
    """Runs of tokens that travel in one message, and their states `[tokens, width]`."""

    runs: list[payloads.Run]
    states: torch.Tensor
    #: Tokens whose output counts, bool `[tokens]`; None for all.
    own: torch.Tensor | None = None

    def output(self, reply: payloads.AnyReply, data: memoryview) -> torch.Tensor:
        """The output `[tokens that count, width]`. Raises Malformed or NonFinite if the reply does not fit."""
        if not isinstance(reply, payloads.Result) or (reply.tokens, reply.width) != self.states.shape:
            raise Malformed(f"the worker returned no states of the shape {tuple(self.states.shape)}")
        output = from_bytes(data, reply.dtype, reply.tokens, reply.width)
        return output if self.own is None else output[self.own]


def cut(runs: list[payloads.Run], packed: torch.Tensor, limit: int, horizon: int | None = None) -> list[Chunk]:
    """Cuts runs so that no chunk has more than `limit` tokens.

    If positions interact, the worker must see the largest position of the call in every run. A run that ends below
    it gets one more token there. The output of this token is dropped, and the row's next run cuts it off.

    Args:
        packed: the states of all runs, `[tokens, width]`.
        horizon: the largest position of the call; None if positions do not interact.
    """
    chunks = []
    begin = 0
    for part in _chunked(runs, limit):
        lengths = [len(run.positions) for run in part]
        states = packed[begin : begin + sum(lengths)]
        begin += sum(lengths)
        short = [horizon is not None and max(run.positions) < horizon for run in part]
        if horizon is None or not any(short):
            chunks.append(Chunk(part, states))
            continue
        pieces, own, extended = [], [], []
        for run, own_states, extra in zip(part, torch.split(states, lengths), short, strict=True):
            pieces += [own_states, own_states[-1:]] if extra else [own_states]
            own += [True] * len(own_states) + [False] * extra
            extended.append(payloads.Run(run.row, run.start, [*run.positions, *[horizon] * extra]))
        chunks.append(Chunk(extended, torch.cat(pieces), torch.tensor(own)))
    return chunks


def _chunked(runs: list[payloads.Run], limit: int) -> list[list[payloads.Run]]:
    chunks: list[list[payloads.Run]] = [[]]
    free = limit
    for run in runs:
        done = 0
        while done < len(run.positions):
            if not free:
                chunks.append([])
                free = limit
            part = run.positions[done : done + free]
            chunks[-1].append(payloads.Run(run.row, run.start + done, part))
            done += len(part)
            free -= len(part)
    return chunks


#: A chunk and its states' bytes.
ChunkRequest = tuple[Chunk, memoryview]

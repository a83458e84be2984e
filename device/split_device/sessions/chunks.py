"""Cuts steps that are too long for one message into chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from split_common.errors import Malformed, UnsupportedFeature
from split_common.models.codecs import EXACT
from split_common.models.codecs.base import Codec
from split_common.models.tensors import dtype_name
from split_common.protocol import headers, payloads
from split_device.sessions.places import PlacedRun

#: Most bytes of hidden states in one message; a longer prefill travels in several messages.
CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Chunk:
    """Runs of tokens that travel in one message, and their states `[tokens, width]`."""

    runs: list[PlacedRun]
    states: torch.Tensor
    #: Tokens whose output counts, bool `[tokens]`; None for all.
    own: torch.Tensor | None = None

    def step(self, select: list[int] | None, codec: Codec, size: int) -> payloads.Step:
        """What travels with the states, given the worker's row for each row, and their bytes in a codec."""
        dtype, width = dtype_name(self.states.dtype), self.states.shape[1]
        runs = [run.run() for run in self.runs]
        axes, spans = [run.axes() for run in self.runs], [span for run in self.runs for span in run.spans()]
        placed: Any = {"axes": axes if any(axes) else [], "spans": spans}
        if codec.name != EXACT:
            placed |= {"codec": codec.name, "size": size}
            return payloads.CodedStep(dtype, width, runs, select, **placed)
        if any(axes) or spans:
            return payloads.PlacedStep(dtype, width, runs, select, **placed)
        return payloads.Step(dtype, width, runs, select)

    def output(self, reply: payloads.AnyReply, data: memoryview, codec: Codec) -> torch.Tensor:
        """The output `[tokens that count, width]`. Raises Malformed or NonFinite if the reply does not fit."""
        if not isinstance(reply, payloads.Result) or (reply.tokens, reply.width) != self.states.shape:
            raise Malformed(f"the worker returned no states of the shape {tuple(self.states.shape)}")
        if codec.name != (reply.codec if isinstance(reply, payloads.CodedResult) else EXACT):
            raise Malformed(f"the worker returned states that are not encoded in {codec.name}")
        output = codec.decode(data, reply.dtype, reply.tokens, reply.width)
        return output if self.own is None else output[self.own]


def cut(
    runs: list[PlacedRun], packed: torch.Tensor, limit: int, horizon: int | None = None, whole_runs: bool = False
) -> list[Chunk]:
    """Cuts runs so that no chunk has more than `limit` tokens, unless they attend to each other both ways.

    If positions interact, the worker must see the largest position of the call in every run. A run that ends below
    it gets one more token there. The output of this token is dropped, and the row's next run cuts it off.

    Args:
        packed: the states of all runs, `[tokens, width]`.
        horizon: the largest position of the call; None if positions do not interact.
        whole_runs: whether no run may be cut at all.
    """
    chunks = []
    begin = 0
    for part in _chunked(runs, limit, whole_runs):
        lengths = [len(run) for run in part]
        states = packed[begin : begin + sum(lengths)]
        begin += sum(lengths)
        short = [horizon is not None and int(run.positions.max()) < horizon for run in part]
        if horizon is None or not any(short):
            chunks.append(Chunk(part, states))
            continue
        pieces, own, extended = [], [], []
        for run, own_states, extra in zip(part, torch.split(states, lengths), short, strict=True):
            pieces += [own_states, own_states[-1:]] if extra else [own_states]
            own += [True] * len(own_states) + [False] * extra
            places = torch.cat([run.places, torch.full_like(run.places[-1:], horizon)]) if extra else run.places
            extended.append(PlacedRun(run.row, run.start, places))
        chunks.append(Chunk(extended, torch.cat(pieces), torch.tensor(own)))
    return chunks


def _chunked(runs: list[PlacedRun], limit: int, whole_runs: bool) -> list[list[PlacedRun]]:
    chunks: list[list[PlacedRun]] = [[]]
    free = limit
    for run in runs:
        done = 0
        while done < len(run):
            if free <= 0:
                chunks.append([])
                free = limit
            part = run if whole_runs else run.part(done, run.whole(done + free))
            chunks[-1].append(part)
            done += len(part)
            free -= len(part)
    return chunks


#: A chunk and its states' bytes.
ChunkRequest = tuple[Chunk, memoryview | bytes]


def encode(
    codec: Codec, runs: list[PlacedRun], packed: torch.Tensor, horizon: int | None, whole_runs: bool = False
) -> list[ChunkRequest]:
    """Cuts runs and their states `[tokens, width]` into requests.

    Raises:
        NonFinite: the states hold NaN or infinity.
        UnsupportedFeature: a run that may not be cut exceeds a message.
    """
    token_bytes = packed.shape[1] * packed.element_size()
    longest, most = max(map(len, runs)), headers.MAX_BODY // 2 // token_bytes
    if whole_runs and longest > most:
        raise UnsupportedFeature(
            f"{longest:,} tokens have to go through this model's layers together, and a message to a worker "
            f"holds {most:,}: shorten the prompt"
        )
    chunks = cut(runs, packed, max(1, CHUNK_BYTES // token_bytes), horizon, whole_runs)
    return [(chunk, codec.encode(chunk.states)) for chunk in chunks]

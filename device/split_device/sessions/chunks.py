"""Cuts steps that are too long for one message into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from split_common.errors import Malformed, UnsupportedFeature
from split_common.models.codecs import CODECS, EXACT
from split_common.models.codecs.base import Codec
from split_common.models.tensors import dtype_name
from split_common.protocol import headers, payloads
from split_device.sessions.places import PlacedRun
from split_device.sessions.requests import Request

#: Most bytes of hidden states in one message; a longer prefill travels in several messages.
CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Chunk:
    """Runs of tokens that travel in one message, and their states `[tokens, width]`."""

    runs: list[PlacedRun]
    states: torch.Tensor
    #: Tokens whose output is wanted, bool `[tokens]`; None for all.
    wanted: torch.Tensor | None = None
    #: It travels, and so does its answer, as if it had this many tokens; None if its size follows its tokens.
    room: int | None = None

    def request(
        self,
        select: list[int] | None,
        codec: Codec,
        data: memoryview | bytes,
        brief: bool,
        pads: bool,
        trees: bool = False,
        kept: Sequence[int] = (),
    ) -> Request:
        """The chunk as it travels.

        Args:
            select: the worker's row for each row, if rows were moved.
            codec, data: the states' bytes, and what encodes them.
            brief: whether the worker returns only the outputs that are wanted.
            pads: whether the worker pads its answer to the size of the step.
            trees: whether the worker takes trees.
            kept: of the tokens before each run, those that stay, see `payloads.TreeStep`; empty for all.
        """
        step = self.step(select, codec, len(data), brief)
        parents = [list(run.parents) for run in self.runs]
        branched = any(parents) or bool(kept)
        if (self.room is None or not pads) and not branched:
            return step, data
        room, padded = step.tokens, 0
        if self.room is not None and pads:
            room, size = self.room, codec.size(step.dtype, self.room, step.width)
            assert size is not None, f"{codec.name} has no size of its own"
            padded = size
        outputs = step.outputs if isinstance(step, payloads.BriefStep) else list(range(step.tokens))
        placed: Any = {name: getattr(step, name, []) for name in ("axes", "spans")}
        coded: Any = {"codec": codec.name, "size": len(data), "outputs": outputs}
        sized: Any = {"room": room, "padded": padded}
        kind: type[payloads.PaddedStep] = payloads.PaddedStep
        if branched or trees:
            # Also for a chain: all steps of an answer have one size.
            kind = payloads.TreeStep
            sized |= {
                "parents": parents if any(parents) else [],
                "kept": [list(kept)] * len(parents) if kept else [],
            }
        request = kind(step.dtype, step.width, step.rows, select, **placed, **coded, **sized)
        return request, b"".join((data, bytes(padded - len(data)))) if padded else data

    def step(self, select: list[int] | None, codec: Codec, size: int, brief: bool) -> payloads.Step:
        """What travels with the states, if its size follows its tokens.

        Args:
            select: the worker's row for each row, if rows were moved.
            codec, size: of the states' bytes.
            brief: whether the worker returns only the outputs that are wanted.
        """
        dtype, width = dtype_name(self.states.dtype), self.states.shape[1]
        runs = [run.run() for run in self.runs]
        axes, spans = [run.axes() for run in self.runs], [span for run in self.runs for span in run.spans()]
        placed: Any = {"axes": axes if any(axes) else [], "spans": spans}
        coded = placed | {"codec": codec.name, "size": size}
        if brief and self.wanted is not None:
            outputs = self.wanted.nonzero().flatten().tolist()
            return payloads.BriefStep(dtype, width, runs, select, **coded, outputs=outputs)
        if codec.name != EXACT:
            return payloads.CodedStep(dtype, width, runs, select, **coded)
        if any(axes) or spans:
            return payloads.PlacedStep(dtype, width, runs, select, **placed)
        return payloads.Step(dtype, width, runs, select)

    def output(self, reply: payloads.AnyReply, data: memoryview, codec: Codec, brief: bool) -> torch.Tensor:
        """The output `[tokens that are wanted, width]`.

        Args:
            brief: whether the worker returns only that.

        Raises:
            Malformed, NonFinite: the reply does not fit.
        """
        tokens, width = self.states.shape
        if brief and self.wanted is not None:
            tokens = int(self.wanted.sum())
        if not isinstance(reply, payloads.Result) or (reply.tokens, reply.width) != (tokens, width):
            raise Malformed(f"the worker returned no states of the shape {(tokens, width)}")
        if codec.name != (reply.codec if isinstance(reply, payloads.CodedResult) else EXACT):
            raise Malformed(f"the worker returned states that are not encoded in {codec.name}")
        if not tokens:
            return self.states.new_empty(0, width, device="cpu")
        output = codec.decode(data, reply.dtype, tokens, width)
        return output if brief or self.wanted is None else output[self.wanted]


def cut(
    runs: list[PlacedRun],
    packed: torch.Tensor,
    limit: int,
    horizon: int | None = None,
    whole_runs: bool = False,
    wanted: torch.Tensor | None = None,
    room: int | None = None,
) -> list[Chunk]:
    """Cuts runs so that no chunk has more than `limit` tokens, unless they attend to each other both ways.

    If positions interact, the worker must see the largest position of the call in every run. A run that ends below
    it gets one more token there. The output of this token is dropped, and the row's next run cuts it off.

    Args:
        packed: the states of all runs, `[tokens, width]`.
        horizon: the largest position of the call; None if positions do not interact.
        whole_runs: whether no run may be cut at all.
        wanted: tokens whose output is wanted, bool `[tokens]`; None for all.
        room: the chunks travel as if they had this many tokens, or a multiple of it; None to travel as they are.
    """
    chunks = []
    begin = 0
    for part in _chunked(runs, limit, whole_runs):
        lengths = [len(run) for run in part]
        here = slice(begin, begin + sum(lengths))
        states, own = packed[here], None if wanted is None else wanted[here]
        begin = here.stop
        short = [horizon is not None and int(run.positions.max()) < horizon for run in part]
        if horizon is None or not any(short):
            chunks.append(Chunk(part, states, own, _room_for(len(states), room)))
            continue
        asked = torch.ones(len(states), dtype=torch.bool) if own is None else own
        pieces, outputs, extended = [], [], []
        for run, own_states, mine, extra in zip(
            part, torch.split(states, lengths), torch.split(asked, lengths), short, strict=True
        ):
            pieces += [own_states, own_states[-1:]] if extra else [own_states]
            outputs += [mine, torch.zeros(int(extra), dtype=torch.bool)]
            places = torch.cat([run.places, torch.full_like(run.places[-1:], horizon)]) if extra else run.places
            extended.append(PlacedRun(run.row, run.start, places))
        chunks.append(
            Chunk(extended, torch.cat(pieces), torch.cat(outputs), _room_for(sum(map(len, extended)), room))
        )
    return chunks


def _room_for(tokens: int, room: int | None) -> int | None:
    """The least multiple of `room` that holds so many tokens."""
    return None if room is None else -(-tokens // room) * room


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


def steady(codec: Codec) -> Codec:
    """What encodes the states of steps whose sizes may not depend on them: a codec, or `exact` in its place."""
    return codec if codec.size("float32", 1, 1) is not None else CODECS[EXACT]


#: A chunk and its states' bytes.
ChunkRequest = tuple[Chunk, memoryview | bytes]


def encode(
    codec: Codec,
    runs: list[PlacedRun],
    packed: torch.Tensor,
    horizon: int | None,
    whole_runs: bool = False,
    wanted: torch.Tensor | None = None,
    room: int | None = None,
) -> list[ChunkRequest]:
    """Cuts runs and their states `[tokens, width]` into requests. Arguments are those of `cut`.

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
    limit = max(1, CHUNK_BYTES // token_bytes)
    if room is not None:
        room = limit = min(room, limit)
        # A run that ends below the largest position gets a token more.
        room += 0 if horizon is None else len(runs)
    chunks = cut(runs, packed, limit, horizon, whole_runs, wanted, room)
    return [(chunk, codec.encode(chunk.states)) for chunk in chunks]

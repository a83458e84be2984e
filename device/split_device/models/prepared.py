"""What a step of a session needs beside its hidden states, and the step as it travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from split_common.engine.trees import depths
from split_common.errors import UnsupportedFeature
from split_common.models.cache_layers import States
from split_common.models.codecs.base import Codec
from split_device.sessions.chunks import ChunkRequest, encode, steady
from split_device.sessions.places import PlacedRun
from split_device.sessions.requests import GrowingStep, Reply
from split_device.sessions.session import RemoteSession
from split_device.sessions.timings import StepTimings


@dataclass
class StepContext:
    """Arguments of the layers' owner that its layers do not see, and the step's timings so far."""

    #: The attention mask `[batch, cached and new tokens]`, zero for padding; None without padding.
    mask: torch.Tensor | None = None
    #: Position ids, int64 `[batch or 1, new tokens]`, or the same for each axis, `[axes, batch or 1, new tokens]`;
    #: None for those that follow the cached columns.
    positions: torch.Tensor | None = None
    #: How many of the tokens after it each token attends to, int64 `[batch, new tokens]`; None for none.
    ahead: torch.Tensor | None = None
    #: Of how many of the last columns the output is wanted; None for all. The others' is zero.
    last: int | None = None
    #: The tokens of a row for which its messages have room, however many it has; 1 if every step has one token.
    #: None if the sizes of messages follow their tokens.
    room: int | None = None
    #: The token of the step that each of its tokens follows, -1 for the last cached one; empty unless it is a tree.
    parents: Sequence[int] = ()
    timings: StepTimings = field(default_factory=StepTimings)
    #: The states of the head's cache layers before the step, by the layer's index.
    head_states: dict[int, States] = field(default_factory=dict)
    #: The layers whose output has been computed together with that of one before them, by index.
    computed: set[int] = field(default_factory=set)

    def sizes(self, codec: Codec, batch: int, pads: bool) -> tuple[Codec, int | None]:
        """How the step travels.

        Args:
            codec: encodes the states of other steps.
            batch: number of rows.
            pads: whether the device gives all decoding steps one size.

        Returns:
            What encodes its states, and the tokens for which each of its messages has room (see `PreparedStep`).
        """
        if self.room is None or not pads:
            return codec, None
        # Steps of one token each have one size, if that does not depend on the token's states.
        return steady(codec), self.room * batch if self.room > 1 else None

    def positions_after(self, cached: int) -> torch.Tensor | None:
        """The position ids after so many cached columns; None for those that follow these."""
        return cached + torch.tensor(depths(self.parents))[None] if self.parents else self.positions


@dataclass
class PreparedStep:
    """A step as it travels, and how its output is put in place."""

    #: Hidden states `[batch, tokens, width]`.
    hidden: torch.Tensor
    #: Their places (`split_device.sessions.places`), on the CPU.
    places: torch.Tensor
    #: Which columns hold tokens after the step, bool `[batch, columns]`.
    columns: torch.Tensor
    #: Which of the new tokens travel, bool `[batch, tokens]`; None for all.
    sent: torch.Tensor | None
    #: Of which ones the output is wanted, likewise; None for all that travel.
    wanted: torch.Tensor | None
    #: The rows that travel, and for each row the index of its equal in this list; None if all rows travel.
    copies: tuple[list[int], list[int]] | None
    #: The tokens that travel; empty if all are padding.
    runs: list[PlacedRun]
    timings: StepTimings
    #: Encodes its states, and those of its answer.
    codec: Codec
    #: The tokens for which each of its messages has room; None if their sizes follow their tokens.
    room: int | None = None
    #: Empty if all tokens are padding. Encoded anew for a worker that takes no parts.
    requests: list[ChunkRequest] = field(default_factory=list)
    #: Where further tokens come from while it is under way; None if it is complete.
    parts: GrowingStep | None = None
    #: Whether the worker that has it returns only the outputs that are wanted.
    brief: bool = False

    #: Whether it pads its answers.
    pads: bool = False
    #: Of the tokens before it, those that stay, as in `Branches`.
    kept: Sequence[int] = ()

    def encode(self, horizon: int | None, whole_runs: bool = False) -> list[ChunkRequest]:
        """Its requests; see `sessions.chunks.encode`."""
        if not self.runs:
            return []
        packed = self.hidden.flatten(0, 1) if self.sent is None else self.hidden[self.sent]
        wanted = self.wanted
        if wanted is not None:
            wanted = wanted.flatten() if self.sent is None else wanted[self.sent]
        with self.timings.measure("encode"):
            return encode(self.codec, self.runs, packed, horizon, whole_runs, wanted, self.room)

    def decode(self, replies: Sequence[Reply]) -> torch.Tensor:
        """The output `[tokens, width]`. Raises Malformed or NonFinite if the replies do not fit."""
        with self.timings.measure("decode"):
            parts = [
                chunk.output(*reply, self.codec, self.brief)
                for (chunk, _), reply in zip(self.requests, replies, strict=True)
            ]
            output = parts[0] if len(parts) == 1 else torch.cat(parts)
        return output.to(self.hidden)

    def place(self, output: torch.Tensor) -> torch.Tensor:
        """The output `[batch, tokens, width]`, given that of the tokens of which it is wanted; zero for others."""
        given = self.sent if self.wanted is None else self.wanted
        if given is None:
            result = output.view(self.hidden.shape)
        else:
            result = self.hidden.new_zeros(self.hidden.shape)
            result[given] = output
        if self.copies is not None:
            rows, copies = self.copies
            result = result[[rows[copy] for copy in copies]]
        return result

    def check_padding(self, session: RemoteSession) -> None:
        """Raises UnsupportedFeature if a row has padding before a token, and the worker's layers would miss it."""
        padded = (~self.columns).cummax(1).values & self.columns
        if not session.takes_padding and bool(padded.any()):
            raise UnsupportedFeature(
                "padding does not run split with this model, because its layers give a different result for a "
                "padded row: pass prompts one at a time, or of the same length"
            )

"""What a step of a session needs beside its hidden states, and the step as it travels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from split_common.errors import UnsupportedFeature
from split_common.models.cache_layers import States
from split_common.models.codecs.base import Codec
from split_device.sessions.chunks import ChunkRequest, encode
from split_device.sessions.places import PlacedRun
from split_device.sessions.requests import GrowingStep
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
    timings: StepTimings = field(default_factory=StepTimings)
    #: The states of the head's cache layers before the step, by the layer's index.
    head_states: dict[int, States] = field(default_factory=dict)


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
    #: Empty if all tokens are padding. Encoded anew for a worker that takes no parts.
    requests: list[ChunkRequest] = field(default_factory=list)
    #: Where further tokens come from while it is under way; None if it is complete.
    parts: GrowingStep | None = None
    #: Whether the worker that has it returns only the outputs that are wanted.
    brief: bool = False

    def encode(self, codec: Codec, horizon: int | None, whole_runs: bool = False) -> list[ChunkRequest]:
        """Its requests; see `sessions.chunks.encode`."""
        if not self.runs:
            return []
        packed = self.hidden.flatten(0, 1) if self.sent is None else self.hidden[self.sent]
        wanted = self.wanted
        if wanted is not None:
            wanted = wanted.flatten() if self.sent is None else wanted[self.sent]
        with self.timings.measure("encode"):
            return encode(codec, self.runs, packed, horizon, whole_runs, wanted)

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
                "padding cannot be split with this model, because its layers give a different result for a "
                "padded row: pass prompts one at a time, or of the same length"
            )

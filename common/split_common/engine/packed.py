"""Runs many sequences in one forward: their tokens are packed, their keys and values are in pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch.nn.functional import pad

from split_common.engine import attention
from split_common.engine.additions import adding
from split_common.engine.attention import AttentionCall, Backend, PackedBatch, Span
from split_common.engine.forward import Forward
from split_common.engine.fused_layers import FusedLayers
from split_common.engine.graphs import DecodeGraphs, new_capture
from split_common.engine.layers import LayerRange
from split_common.engine.lora import AdapterNumber, adapting, is_adapted
from split_common.engine.mixed import plan_batch
from split_common.engine.pool import PagedSequence, PagePool
from split_common.engine.sequences import TokenRun, positions_of

#: Whether layers are fused, or will be.
Fusion = Literal["fused", "compiling"]


class Fusing(Protocol):
    """Layers whose code is being compiled."""

    @property
    def ready(self) -> bool:
        """Whether it is compiled, or never will be."""

    def fuse(self) -> FusedLayers | None:
        """The layers in one call; None if that fails, or gives another output."""


class PackedExecutor:
    """Runs all tokens of a batch in one forward (an `Executor`).

    Args:
        layers: the layers to run, which use the attention of `split_common.engine.attention`.
        pool: holds keys and values.
        backend: computes the attention.
        calls: what each layer passes to its attention, by its index; empty if it was not asked.
    """

    def __init__(
        self,
        layers: LayerRange,
        pool: PagePool,
        backend: Backend,
        calls: Mapping[int, AttentionCall] | None = None,
    ) -> None:
        self._layers = layers
        self.calls = calls or {}
        #: Computes batches in one call; None while they go through the layers' own code.
        self.fused: FusedLayers | None = None
        #: Gives `fused` as soon as its code is compiled; None if it never will, or has.
        self.fusing: Fusing | None = None
        self.store = pool
        self.backend = backend
        #: Whether the output of a token in a tree was found to be that of the path to it.
        self.takes_trees = False
        #: Graphs of decoding batches; None unless `capture_graphs` was called.
        self.graphs: DecodeGraphs | None = None

    @property
    def attention(self) -> str:
        """The name of the backend."""
        return self.backend.name

    @property
    def fusion(self) -> Fusion | None:
        """Whether batches are computed in one call, or will be once its code is compiled; None if neither."""
        return "fused" if self.fused is not None else "compiling" if self.fusing is not None else None

    @property
    def capturable(self) -> bool:
        """Whether decoding batches can be CUDA graphs."""
        layers = self._layers
        return self.backend.capturable and not (
            layers.stack.positions_interact or len(set(layers.devices)) > 1 or is_adapted(layers.owner)
        )

    def capture_graphs(self) -> None:
        """Makes decoding batches run as CUDA graphs from now on. Each is captured when it is first needed."""
        layers = self._layers
        self.graphs = DecodeGraphs(self._run_layers, self.store, layers.width, layers.dtype, new_capture)

    @torch.inference_mode()
    def launch(self, runs: Sequence[TokenRun[PagedSequence]]) -> Forward:
        """Appends the runs' tokens to their sequences. Raises OutOfPages if the pool lacks memory."""
        if self.fusing is not None and self.fusing.ready:
            self.fused, self.fusing = self.fusing.fuse(), None
        # Decoding sequences come first, so that attention can take them together, and what is not causal last.
        order = sorted(range(len(runs)), key=lambda index: _rank(runs[index]))
        runs = [runs[index] for index in order]
        spans, new_slots, begin = [], [], 0
        for run in runs:
            new_slots.append(run.sequence.append(run.cost))
            spans.append(Span(run.sequence, begin, run.cost, tuple(run.spans), tuple(run.parents)))
            begin += run.cost
        states = torch.cat([run.states for run in runs])
        positions = positions_of([place for run in runs for place in run.places])
        slots = torch.from_numpy(np.concatenate(new_slots))
        plain = not any(run.additions for run in runs)
        adapters = [run.adapter for run in runs]
        output = None
        if plain and self.fused is not None and self.fused.takes(spans, positions, adapters):
            output = self.fused.run(self.store, spans, states, positions, slots)
        elif plain:
            output = self._replay(spans, states, positions, slots)
        if output is None:
            with adding(self._layers, runs):
                output = self._run(spans, states, positions, slots, adapters)
        return Forward(output, [span.count for span in spans], order)

    def _replay(
        self, spans: Sequence[Span], states: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor | None:
        """The output of a graph; None if there is no graph for this batch."""
        if self.graphs is None or len(spans) < len(states) or positions.ndim > 2:
            return None
        return self.graphs.run(spans, states, positions, slots)

    def _run(
        self,
        spans: Sequence[Span],
        states: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        adapters: Sequence[AdapterNumber],
    ) -> torch.Tensor:
        layers, tokens = self._layers, len(states)
        counts, padding = [span.count for span in spans], 0
        plan = plan_batch(self.backend, self.store, spans, layers.device)
        if layers.device.type == "cpu" and (padding := layers.tuning.padded(tokens) - tokens):
            states, positions = pad(states, (0, 0, 0, padding)), pad(positions, (0, padding))
        with_padding = [*counts, padding] if padding else counts
        batch = PackedBatch(self.store, with_padding, layers.to_device(slots), plan)
        with adapting(adapters, counts, padding):
            return self._run_layers(layers.to_device(states), layers.to_device(positions), batch)[:tokens]

    def _run_layers(self, states: torch.Tensor, positions: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        token = attention.current.set(batch)
        try:
            return self._layers.forward(states, positions, use_cache=False)
        finally:
            attention.current.reset(token)


def _rank(run: TokenRun[PagedSequence]) -> tuple[bool, bool]:
    """The place of a run in a batch."""
    return bool(run.spans) or bool(run.parents), run.cost > 1

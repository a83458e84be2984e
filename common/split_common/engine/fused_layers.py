"""Layers of the usual shape, all of them in one call of our own code (`fused.cpp`), where that gives their output.

A step of few rows is then bound by reading the weights: there are no operators between them to launch. Python's
lock is free during the call.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from split_common.engine.attention import AttentionCall, Span
from split_common.engine.fused_sketch import OtherShape, Part, Sketch
from split_common.engine.layers import LayerRange
from split_common.engine.pool import LayerShape, PagePool

log = logging.getLogger(__name__)

#: Positions of a first table of rotary embeddings, and of a part by which it grows.
TABLE_POSITIONS = 1024

#: Most positions of the table. Rows beyond it are computed for each forward.
MOST_POSITIONS = 1 << 15


class _Product(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("norm1", "norm2", "query_norm", "key_norm")),
        *((name, _Product) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", "keys", "values")),
        *((name, ctypes.c_float) for name in ("epsilon1", "epsilon2", "query_epsilon", "key_epsilon", "scale")),
        ("activation", ctypes.c_int32),
        ("window", ctypes.c_int64),
    )


class _Shape(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("width", "heads", "key_heads", "head_width", "inner", "rotated", "page_tokens")
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("slots", "counts", "lengths", "pages", "first_pages")),
    )


class FusedLayers:
    """The layers of a range, computed by one call. Not thread-safe: one thread computes.

    Args:
        library: the compiled code.
        layers: the range.
        sketches: what its layers are, by index.
        attention: what each layer has passed to its attention, by index.
        shapes: of each layer's keys and values, by index.

    Raises:
        OtherShape: the layers are not all alike, or ask for more than the code computes.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        layers: LayerRange,
        sketches: Mapping[int, Sketch],
        attention: Mapping[int, AttentionCall],
        shapes: dict[int, LayerShape],
    ) -> None:
        indices = list(layers.split.body)
        self._layers, self._indices = layers, indices
        #: Computes all layers; see `run_layers` in `fused.cpp`.
        self.call = library.run_layers
        self._rotary = _Rotary(layers)
        first = sketches[indices[0]]
        kind = shapes[indices[0]]
        heads = first.output.in_features // kind.key_width
        self._shape = _Shape(
            layers.width,
            heads,
            kind.heads,
            kind.key_width,
            first.down.in_features,
            self._rotary.width,
            0,
        )
        #: Tensors whose memory the code reads.
        self._kept: list[torch.Tensor] = []
        self._array = (_Layer * len(indices))()
        self._pool: PagePool | None = None
        for each, index in zip(self._array, indices, strict=True):
            sketch, call, shape = sketches[index], attention[index], shapes[index]
            if (shape.heads, shape.key_width, shape.value_width) != (kind.heads, kind.key_width, kind.key_width):
                raise OtherShape("its layers have keys and values of several shapes")
            if call.softcap is not None or call.sinks is not None:
                raise OtherShape("its attention has capped logits or sinks")
            self._fill(each, sketch, call)

    def _fill(self, to: _Layer, sketch: Sketch, call: AttentionCall) -> None:
        shape = self._shape
        heads, keys = shape.heads * shape.head_width, shape.key_heads * shape.head_width
        sizes = {
            "projections": sum(linear.out_features for linear in sketch.projections) == heads + 2 * keys,
            "output": (sketch.output.in_features, sketch.output.out_features) == (heads, shape.width),
            "down": (sketch.down.in_features, sketch.down.out_features) == (shape.inner, shape.width),
            "heads": shape.heads % shape.key_heads == 0 and heads == sketch.output.in_features,
            "projections' input": all(linear.in_features == shape.width for linear in sketch.projections),
            "gate": sketch.gate.linear.in_features == shape.width == sketch.up.linear.in_features,
            "norms": all(len(norm.weight) == shape.width for norm in sketch.norms),
        }
        if wrong := [name for name, fits in sizes.items() if not fits]:
            raise OtherShape(f"its {', '.join(wrong)} have other sizes")
        to.norm1, to.norm2 = (self._pointer(norm.weight) for norm in sketch.norms)
        to.epsilon1, to.epsilon2 = (norm.epsilon for norm in sketch.norms)
        if sketch.head_norms is not None:
            if any(len(norm.weight) != shape.head_width for norm in sketch.head_norms):
                raise OtherShape("queries and keys are not normalized by heads")
            to.query_norm, to.key_norm = (self._pointer(norm.weight) for norm in sketch.head_norms)
            to.query_epsilon, to.key_epsilon = (norm.epsilon for norm in sketch.head_norms)
        widths = (heads, keys, keys)
        if len(sketch.projections) == 1:
            ends = list(itertools.accumulate(widths, initial=0))
            parts = [Part(sketch.projections[0], *pair) for pair in itertools.pairwise(ends)]
        else:
            parts = [Part(linear, 0, linear.out_features) for linear in sketch.projections]
            if [part.end for part in parts] != list(widths):
                raise OtherShape("queries, keys and values come in another order")
        to.query, to.key, to.value = map(self._product, parts)
        to.gate, to.up = self._product(sketch.gate), self._product(sketch.up)
        to.output, to.down = (
            self._product(Part(linear, 0, linear.out_features)) for linear in (sketch.output, sketch.down)
        )
        to.scale, to.window, to.activation = call.scale, call.window or 0, sketch.activation

    def _product(self, part: Part) -> _Product:
        return _Product(self._pointer(part.weight), None if part.bias is None else self._pointer(part.bias))

    def _pointer(self, tensor: torch.Tensor) -> int:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise OtherShape("its weights are not fp32, or do not lie one after another")
        self._kept.append(tensor)
        return tensor.data_ptr()

    def takes(self, spans: Sequence[Span], positions: torch.Tensor, adapters: Sequence[int | None]) -> bool:
        """Whether the code computes a batch: no adapters, positions on one axis, causal."""
        plain = all(span.is_causal for span in spans) and all(adapter is None for adapter in adapters)
        return plain and positions.ndim == 2

    def run(
        self,
        pool: PagePool,
        spans: Sequence[Span],
        states: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """The last layer's output `[tokens, width]`.

        Args:
            pool: holds keys and values; those of new tokens are written to it.
            spans: the sequences, with the new tokens.
            states: `[tokens, width]`, float32 or converted to it.
            positions: rotary positions, int64 `[1, tokens]`.
            slots: of the new tokens, int64 `[tokens]`.

        Raises:
            MemoryError: there is none for intermediate results.
        """
        if pool is not self._pool:
            self._use(pool)
        output = states.to(torch.float32, copy=True).contiguous()
        # Held until the call returns.
        tables = self._rotary.rows(positions[0])
        for each, index in zip(self._array, self._indices, strict=True):
            if (pair := tables.get(index)) is not None:
                each.cosines, each.sines = pair[0].data_ptr(), pair[1].data_ptr()
        counts = np.array([span.count for span in spans], dtype=np.int64)
        lengths = np.array([span.sequence.length for span in spans], dtype=np.int64)
        pages = np.array([page for span in spans for page in span.sequence.pages], dtype=np.int64)
        sizes = np.array([0, *(len(span.sequence.pages) for span in spans)], dtype=np.int64)
        firsts = np.cumsum(sizes)[:-1].copy()
        places = slots.contiguous()
        arrays = (array.ctypes.data for array in (counts, lengths, pages, firsts))
        batch = _Batch(len(states), len(spans), places.data_ptr(), *arrays)
        if self.call(
            self._array,
            ctypes.c_int64(len(self._indices)),
            ctypes.byref(self._shape),
            ctypes.byref(batch),
            ctypes.c_void_p(output.data_ptr()),
            ctypes.c_int(torch.get_num_threads()),
        ):
            raise MemoryError("there is no memory for a forward")
        return output

    def _use(self, pool: PagePool) -> None:
        for each, index in zip(self._array, self._indices, strict=True):
            keys, values = pool.layers[index]
            each.keys, each.values = keys.data_ptr(), values.data_ptr()
        self._shape.page_tokens = pool.page_tokens
        self._pool = pool


class _Rotary:
    """The rotary embeddings that each layer of a range is handed, by position.

    Raises:
        OtherShape: layers are handed other things.
    """

    def __init__(self, layers: LayerRange) -> None:
        if not layers.stack.takes_positions:
            raise OtherShape("it takes no positions")
        self._layers = layers
        #: Which of the tables each layer has, and cosines and sines `[positions, width]` of each.
        self._of, self._tables = self._block(0)
        widths = {cosines.shape[1] for cosines, _ in self._tables}
        if len(widths) > 1:
            raise OtherShape("its rotary embeddings have several widths")
        self.width = widths.pop()

    def rows(self, positions: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Cosines and sines `[tokens, width]` of positions, int64 `[tokens]`, by the layer's index."""
        if int(positions.min()) < 0 or int(positions.max()) >= MOST_POSITIONS:
            of, rows = self._look_up(positions)
            return {index: rows[table] for index, table in of.items()}
        while int(positions.max()) >= (have := len(self._tables[0][0])):
            blocks = [self._block(begin)[1] for begin in range(have, 2 * have, TABLE_POSITIONS)]
            self._tables = [
                (torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs]))
                for pairs in zip(self._tables, *blocks, strict=True)
            ]
        rows = [
            (cosines.index_select(0, positions), sines.index_select(0, positions))
            for cosines, sines in self._tables
        ]
        return {index: rows[table] for index, table in self._of.items()}

    def _block(self, begin: int) -> tuple[dict[int, int], list[tuple[torch.Tensor, torch.Tensor]]]:
        """What layers are handed for a part of the table."""
        return self._look_up(torch.arange(begin, begin + TABLE_POSITIONS))

    @torch.inference_mode()
    def _look_up(self, positions: torch.Tensor) -> tuple[dict[int, int], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Cosines and sines of positions, each pair once, and which of them each layer has."""
        of: dict[int, int] = {}
        tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, arguments in self._layers.stack.arguments_of(positions[None]).items():
            if index not in self._layers.split.body:
                continue
            pairs = [pair for value in arguments.values() if (pair := _pair(value, len(positions))) is not None]
            if len(pairs) != 1:
                raise OtherShape(f"layer {index} is handed {len(pairs)} rotary embeddings")
            same = (i for i, pair in enumerate(tables) if all(map(torch.equal, pair, pairs[0])))
            if (found := next(same, None)) is None:
                found = len(tables)
                tables.append(pairs[0])
            of[index] = found
        return of, tables


def _pair(value: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosines and sines `[tokens, width]`, if an argument of a layer is both."""
    if not isinstance(value, tuple) or len(value) != 2:
        return None
    if not all(isinstance(each, torch.Tensor) and each.ndim == 3 for each in value):
        return None
    if any(each.shape[:2] != (1, tokens) or not each.is_floating_point() for each in value):
        return None
    cosines, sines = (each[0].to(torch.float32).contiguous() for each in value)
    return cosines, sines

"""Layers of the usual shape, all of them in one call of our own code (`fused.cpp`), where that gives their output.

A step of few rows is then bound by reading the weights: there are no operators between them to launch. Python's
lock is free during the call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence

import torch

from split_common.engine.attention import AttentionCall, Span
from split_common.engine.fused_call import FusedCall, PageLayout, Sequences, rotary_pair
from split_common.engine.fused_sketch import OtherShape, Sketch
from split_common.engine.layers import LayerRange
from split_common.engine.pool import LayerShape, PagePool

#: Positions of a first table of rotary embeddings, and of a part by which it grows.
TABLE_POSITIONS = 1024

#: Most positions of the table. Rows beyond it are computed for each forward.
MOST_POSITIONS = 1 << 15


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
        self._indices = list(layers.split.body)
        kind = shapes[self._indices[0]]
        if any(shapes[index] != kind for index in self._indices):
            raise OtherShape("its layers have keys and values of several shapes")
        self._rotary = _Rotary(layers)
        parts = [(sketches[index], attention[index]) for index in self._indices]
        #: Computes all layers, and the first one alone, which is timed.
        self.all, self.first = (
            FusedCall(library, some, layers.width, self._rotary.width, kind) for some in (parts, parts[:1])
        )
        self._shape = kind
        #: Whether it takes less time than the layers' own code, by the number of tokens.
        self.is_faster: Callable[[int], bool] = lambda _tokens: True

    def takes(self, spans: Sequence[Span], positions: torch.Tensor, adapters: Sequence[int | None]) -> bool:
        """Whether the code computes a batch: no adapters, positions on one axis, causal, and faster so."""
        plain = all(span.is_causal for span in spans) and all(adapter is None for adapter in adapters)
        return plain and positions.ndim == 2 and self.is_faster(positions.shape[-1])

    def run(
        self,
        pool: PagePool,
        spans: Sequence[Span],
        states: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        *,
        first: bool = False,
    ) -> torch.Tensor:
        """The last layer's output `[tokens, width]`; the first one's, if that alone is to be computed.

        Args:
            pool: holds keys and values; those of new tokens are written to it.
            spans: the sequences, with the new tokens.
            states: `[tokens, width]`, float32 or converted to it.
            positions: rotary positions, int64 `[1, tokens]`.
            slots: of the new tokens, int64 `[tokens]`.

        Raises:
            MemoryError: there is none for intermediate results.
        """
        output = states.to(torch.float32, copy=True).contiguous()
        tables = self._rotary.rows(positions[0])
        tokens, heads, width = pool.page_tokens, self._shape.heads, self._shape.key_width
        call, indices = (self.first, self._indices[:1]) if first else (self.all, self._indices)
        call.run(
            output,
            [tables[index] for index in indices],
            [pool.layers[index] for index in indices],
            PageLayout(tokens, heads * width, width, tokens * heads * width),
            Sequences(
                [span.count for span in spans],
                [span.sequence.length for span in spans],
                [span.sequence.pages for span in spans],
                slots,
            ),
        )
        return output


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
        return self._look_up(torch.arange(begin, begin + TABLE_POSITIONS, device="cpu"))

    @torch.inference_mode()
    def _look_up(self, positions: torch.Tensor) -> tuple[dict[int, int], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Cosines and sines of positions, each pair once, and which of them each layer has."""
        of: dict[int, int] = {}
        tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, arguments in self._layers.stack.arguments_of(positions[None]).items():
            if index not in self._layers.split.body:
                continue
            pairs = [
                pair for value in arguments.values() if (pair := rotary_pair(value, 1, len(positions))) is not None
            ]
            if len(pairs) != 1:
                raise OtherShape(f"layer {index} is handed {len(pairs)} rotary embeddings")
            same = (i for i, pair in enumerate(tables) if all(map(torch.equal, pair, pairs[0])))
            if (found := next(same, None)) is None:
                found = len(tables)
                tables.append(pairs[0])
            of[index] = found
        return of, tables

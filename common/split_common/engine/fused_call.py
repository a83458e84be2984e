"""One call of our own code (`fused.cpp`) that computes layers of the usual shape, and what it is handed."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from split_common.engine.attention import AttentionCall
from split_common.engine.fused_sketch import OtherShape, Part, Sketch
from split_common.engine.pool import LayerShape


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
        for name in (
            *("width", "heads", "key_heads", "head_width", "inner", "rotated"),
            *("page_tokens", "token_step", "head_step", "page_step"),
        )
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("slots", "counts", "lengths", "pages", "first_pages")),
    )


class PageLayout(NamedTuple):
    """How keys and values lie: the tokens of a page, and the numbers from a token, head and page to the next."""

    page_tokens: int
    token_step: int
    head_step: int
    page_step: int


@dataclass(frozen=True)
class Sequences:
    """The sequences of a call, whose new tokens follow each other."""

    #: How many new tokens each has, and how many tokens with these.
    counts: Sequence[int]
    lengths: Sequence[int]
    #: The pages of each.
    pages: Sequence[Sequence[int]]
    #: Where keys and values of new tokens go, int64 `[tokens]`: its page's number times the tokens of a page, and
    #: the place in it.
    slots: torch.Tensor


class FusedCall:
    """Computes some layers, one after the other. Several threads may call it at once.

    Args:
        library: the compiled code.
        layers: what they are, and what each has passed to its attention.
        width: of the hidden states.
        rotated: how many numbers of a head are rotated.
        shape: of the keys and values of each.

    Raises:
        OtherShape: the layers are not all alike, or ask for more than the code computes.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        layers: Sequence[tuple[Sketch, AttentionCall]],
        width: int,
        rotated: int,
        shape: LayerShape,
    ) -> None:
        #: Computes all layers; see `run_layers` in `fused.cpp`.
        self.call = library.run_layers
        first, _ = layers[0]
        heads = first.output.in_features // shape.key_width
        self._shape = _Shape(width, heads, shape.heads, shape.key_width, first.down.in_features, rotated)
        #: Tensors whose memory the code reads.
        self._kept: list[torch.Tensor] = []
        self._array = (_Layer * len(layers))()
        if shape.key_width != shape.value_width:
            raise OtherShape("its keys and values have other widths")
        for each, (sketch, call) in zip(self._array, layers, strict=True):
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
        self._kept.append(tensor)
        return _pointer(tensor)

    def run(
        self,
        states: torch.Tensor,
        rotary: Sequence[tuple[torch.Tensor, torch.Tensor]],
        storage: Sequence[tuple[torch.Tensor, torch.Tensor]],
        layout: PageLayout,
        sequences: Sequences,
    ) -> None:
        """Replaces states `[tokens, width]`, float32 and contiguous, by the last layer's output.

        Args:
            rotary: cosines and sines `[tokens, rotated]` of each layer, float32 and contiguous.
            storage: keys and values of each layer; those of new tokens are written to it.
            layout: how these lie in it.
            sequences: of the tokens.

        Raises:
            MemoryError: there is none for intermediate results.
        """
        layers = type(self._array).from_buffer_copy(self._array)
        for each, (cosines, sines), (keys, values) in zip(layers, rotary, storage, strict=True):
            each.cosines, each.sines = cosines.data_ptr(), sines.data_ptr()
            each.keys, each.values = keys.data_ptr(), values.data_ptr()
        shape = _Shape.from_buffer_copy(self._shape)
        shape.page_tokens, shape.token_step, shape.head_step, shape.page_step = layout
        firsts = itertools.accumulate(map(len, sequences.pages), initial=0)
        # Held until the call returns.
        arrays = [
            np.fromiter(numbers, dtype=np.int64)
            for numbers in (
                sequences.counts,
                sequences.lengths,
                itertools.chain.from_iterable(sequences.pages),
                firsts,
            )
        ]
        slots = sequences.slots.contiguous()
        addresses = (array.ctypes.data for array in arrays)
        batch = _Batch(len(states), len(sequences.counts), slots.data_ptr(), *addresses)
        if self.call(
            layers,
            ctypes.c_int64(len(layers)),
            ctypes.byref(shape),
            ctypes.byref(batch),
            ctypes.c_void_p(states.data_ptr()),
            ctypes.c_int(torch.get_num_threads()),
        ):
            raise MemoryError("there is no memory for a forward")


def _pointer(tensor: torch.Tensor) -> int:
    """The address of numbers that the code reads. Raises OtherShape if it cannot."""
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise OtherShape("its weights are not fp32, or do not lie one after another")
    return tensor.data_ptr()


def rotary_pair(value: Any, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosines and sines `[rows * tokens, width]`, if an argument is both, `[rows or 1, tokens, width]` each."""
    if not isinstance(value, tuple) or len(value) != 2:
        return None
    if not all(isinstance(each, torch.Tensor) and each.ndim == 3 for each in value):
        return None
    if any(
        each.shape[0] not in (1, rows) or each.shape[1] != tokens or not each.is_floating_point() for each in value
    ):
        return None
    cosines, sines = (
        each.expand(rows, -1, -1).to(torch.float32).reshape(rows * tokens, -1).contiguous() for each in value
    )
    return cosines, sines


class OwnProduct:
    """A linear layer by our own code, which takes less time for few rows than torch on some CPUs.

    Args:
        library: the compiled code.
        linear: the layer, in fp32 on the CPU.
        outputs: how many of its outputs; None for all.

    Raises:
        OtherShape: its weight is of another kind.
    """

    def __init__(self, library: ctypes.CDLL, linear: nn.Linear, outputs: int | None = None) -> None:
        weight, bias = linear.weight.data, None if linear.bias is None else linear.bias.data
        self._run, self._kept = library.run_product, (weight, bias)
        self._product = _Product(_pointer(weight), None if bias is None else _pointer(bias))
        self._inputs, self._outputs = linear.in_features, outputs or linear.out_features

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """The outputs `[..., outputs]` of states `[..., inputs]`, float32."""
        states = states.contiguous()
        output = states.new_empty(*states.shape[:-1], self._outputs)
        self._run(
            ctypes.byref(self._product),
            ctypes.c_int64(self._inputs),
            ctypes.c_int64(self._outputs),
            ctypes.c_void_p(states.data_ptr()),
            ctypes.c_int64(states.numel() // self._inputs),
            ctypes.c_void_p(output.data_ptr()),
            ctypes.c_int(torch.get_num_threads()),
        )
        return output

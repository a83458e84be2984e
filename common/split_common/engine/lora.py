"""Low-rank adapters in the layers of a model: each token of a forward has one of them, or none.

The tokens of one adapter go through its two small products together, whichever sequences they belong to, as in
Punica (https://arxiv.org/abs/2310.18547). Tokens without an adapter are not touched: their numbers stay the same.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from split_common.errors import ModelError, UnsupportedFeature
from split_common.models.adapters import Adapter, layer_of
from split_common.models.layer_stack import LayerStack
from split_common.models.split import Split
from split_common.models.weights import Side, read_tensors

#: The number of an adapter, in the order of loading; None for a token without one.
AdapterNumber = int | None


@dataclass(frozen=True)
class TokenAdapters:
    """Which tokens of a forward have which adapter.

    Args:
        tokens: how many tokens have a place in the forward, including padding; None if all have the same adapter.
        rows: the indices of each adapter's tokens; None for all of them.
    """

    tokens: int | None
    rows: Mapping[int, torch.Tensor | None]


#: The adapters of the forward under way; None if the model's own choice holds.
_current: ContextVar[TokenAdapters | None] = ContextVar("adapters", default=None)


@contextlib.contextmanager
def adapting(adapters: Sequence[AdapterNumber], counts: Sequence[int], padding: int = 0) -> Iterator[None]:
    """Gives tokens their adapters for the forwards inside.

    Args:
        adapters: of each run of tokens.
        counts: how many tokens each run has.
        padding: tokens behind the last run, whose output is not used.
    """
    token = _current.set(_token_adapters(adapters, counts, padding))
    try:
        yield
    finally:
        _current.reset(token)


def _token_adapters(adapters: Sequence[AdapterNumber], counts: Sequence[int], padding: int) -> TokenAdapters:
    different = set(adapters)
    if len(different) <= 1:
        return TokenAdapters(None, {number: None for number in different if number is not None})
    rows: dict[int, list[int]] = {}
    begin = 0
    for number, count in zip(adapters, counts, strict=True):
        if number is not None:
            rows.setdefault(number, []).extend(range(begin, begin + count))
        begin += count
    return TokenAdapters(begin + padding, {number: torch.tensor(own) for number, own in rows.items()})


class ChosenAdapter:
    """The adapter of the forwards that are not inside `adapting`: those of `generate` on a device's model.

    Copies of the model share it.
    """

    def __init__(self) -> None:
        self.number: AdapterNumber = None

    def __deepcopy__(self, _memo: object) -> ChosenAdapter:
        return self

    @property
    def for_all(self) -> TokenAdapters:
        return TokenAdapters(None, {} if self.number is None else {self.number: None})


class LowRank(nn.Module):
    """One adapter's part of one linear layer: `B A x · scaling`, in fp32 as PEFT computes it by default.

    Args:
        first, second: A `[rank, in]` and B `[out, rank]`.
    """

    def __init__(self, first: torch.Tensor, second: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.register_buffer("first", first.float(), persistent=False)
        self.register_buffer("second", second.float(), persistent=False)
        self.scaling = scaling

    first: torch.Tensor
    second: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.first.nbytes + self.second.nbytes

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return linear(linear(states.to(self.first.dtype), self.first), self.second) * self.scaling


class AdaptedLinear(nn.Module):
    """A linear layer with the low-rank parts of adapters.

    Args:
        base: the layer, of any class; it is called for all tokens.
        chosen: the adapter of forwards that say nothing about it.
    """

    def __init__(self, base: nn.Module, chosen: ChosenAdapter) -> None:
        super().__init__()
        self.base = base
        self.parts = nn.ModuleDict()
        self._chosen = chosen

    def __getattr__(self, name: str) -> Any:
        # The code around may read the layer's weight, bias or sizes.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.base(states)
        adapters = _current.get() or self._chosen.for_all
        for number, rows in adapters.rows.items():
            if str(number) not in self.parts:
                continue
            part = self.parts[str(number)]
            if rows is None:
                output = (output + part(states)).to(output.dtype)
            else:
                output = _with_rows(output, part, states, rows, adapters.tokens)
        return output


def _with_rows(
    output: torch.Tensor, part: nn.Module, states: torch.Tensor, rows: torch.Tensor, tokens: int | None
) -> torch.Tensor:
    """An output to some rows of which a low-rank part was added."""
    flat, states = output.flatten(0, -2), states.flatten(0, -2)
    if len(states) != tokens:
        raise UnsupportedFeature(
            f"a layer with an adapter is called with {len(states)} of {tokens} tokens: sessions with different "
            "adapters cannot share its forwards"
        )
    rows = rows.to(states.device)
    changed = (flat[rows] + part(states[rows])).to(flat.dtype)
    return flat.index_copy(0, rows, changed).view(output.shape)


# --- putting adapters into a model -------------------------------------------------------------------------


def is_adapted(model: nn.Module) -> bool:
    """Whether some layer of a model has adapters."""
    return any(isinstance(module, AdaptedLinear) for module in model.modules())


def adapter_bytes(model: nn.Module) -> int:
    """Bytes of all adapters in a model."""
    return sum(module.nbytes for module in model.modules() if isinstance(module, LowRank))


def add_adapter(
    model: nn.Module,
    stack: LayerStack,
    split: Split,
    side: Side,
    adapter: Adapter,
    number: int,
    chosen: ChosenAdapter,
) -> None:
    """Puts a side's part of an adapter into its part of a model. Reads only the tensors of the side's layers.

    Args:
        model, stack: the side's part of the model, and its slots.
        split, side: the body's layers, and whether they are here.
        adapter: the adapter.
        number: its number.
        chosen: the adapter of forwards that say nothing about it.

    Raises:
        ModelError: a tensor does not fit its layer, or is not finite; nothing was changed.
        UnsupportedFeature: it changes a module that is not a linear layer; nothing was changed.
    """
    own = _own_modules(model, stack, split, side, adapter)
    tensors = read_tensors(adapter.checkpoint, [tensor for module in own for tensor in adapter.modules[module]])
    for module, layer in own.items():
        sizes = _sizes(layer)
        if sizes is None:
            raise UnsupportedFeature(
                f"the adapter {adapter.name} changes {module}, a {type(layer).__name__}: only linear layers can "
                "have adapters in a split model"
            )
        first, second = (tensors[tensor] for tensor in adapter.modules[module])
        if (first.shape[1], second.shape[0]) != sizes:
            raise ModelError(
                f"the adapter {adapter.name} is for another model: {module} has {sizes[0]} inputs and {sizes[1]} "
                f"outputs, its tensors {first.shape[1]} and {second.shape[0]}"
            )
        if not (first.isfinite().all() and second.isfinite().all()):
            raise ModelError(f"the adapter {adapter.name}: the tensors of {module} hold NaN or infinity")
    for module, layer in own.items():
        first, second = (tensors[tensor] for tensor in adapter.modules[module])
        adapted = layer if isinstance(layer, AdaptedLinear) else AdaptedLinear(layer, chosen)
        part = LowRank(first, second, adapter.config.scaling(module))
        adapted.parts[str(number)] = part.to(_device(layer))
        parent, _, name = module.rpartition(".")
        setattr(model.get_submodule(parent), name, adapted)


def _own_modules(
    model: nn.Module, stack: LayerStack, split: Split, side: Side, adapter: Adapter
) -> dict[str, nn.Module]:
    """The modules that an adapter changes on one side, by name. Raises ModelError if the model lacks one."""
    (prefix,) = (name for name, module in model.named_modules() if module is stack.slots)
    own = {}
    for module in adapter.modules:
        if (layer_of(module, prefix) in split.body) != (side == "worker"):
            continue
        try:
            own[module] = model.get_submodule(module)
        except AttributeError:
            raise ModelError(
                f"the adapter {adapter.name} is for another model: it changes {module}, which this one lacks"
            ) from None
    return own


def _device(layer: nn.Module) -> torch.device:
    """Where a layer's weights are; those of quantized layers may be buffers."""
    tensors = itertools.chain(layer.parameters(), layer.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, also of GPT-2's kind; None for other modules."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        inputs, outputs = (getattr(layer, name, None) for name in names)
        if isinstance(inputs, int) and isinstance(outputs, int):
            return inputs, outputs
    return None

"""Lays the layers of a body over several devices: a contiguous range on each, balanced by the bytes of weights.

Each range is moved to its device, and in each forward what its layers are handed: hidden states, and what the model
prepares for all layers, such as rotary embeddings and masks. Keys, values and states are on the device of their
layer, because caches take the device of what they are given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from split_common.engine.lora import adapter_bytes
from split_common.errors import ConfigError, ModelError
from split_common.models.layer_links import find_links
from split_common.models.layer_stack import LayerStack
from split_common.models.quantization import stored_bytes
from split_common.models.split import Split


@dataclass(frozen=True)
class PlacedRange:
    """The layers `[first, last)` of a body, the device that they are on, and the bytes of their weights."""

    device: torch.device
    first: int
    last: int
    parameter_bytes: int

    def __str__(self) -> str:
        return f"{self.first}:{self.last} on {self.device} ({self.parameter_bytes:,} bytes)"


def spread(
    model: nn.Module,
    stack: LayerStack,
    split: Split,
    config: Any,
    devices: Sequence[torch.device],
    rooms: Sequence[int],
) -> list[PlacedRange]:
    """Moves a body's layers to several devices, a range to each, and all else to the first one.

    Args:
        model, stack: the worker's part of the model, and its slots.
        split: the body's layers.
        config: the model's text configuration, which tells the layers that must be on one device.
        devices: where the ranges go, in order.
        rooms: most bytes of weights for each of them.

    Returns:
        The ranges.

    Raises:
        ConfigError: there are fewer ranges into which the layers can be divided than devices.
        ModelError: the devices have too little room.
    """
    layers = list(stack.slots[split.first : split.last])
    sizes = [weight_bytes(layer) for layer in layers]
    cuts = [0, *divide(sizes, rooms, list(_cuts(layers, split, config))), len(layers)]
    slots = stack.slots
    setattr(stack.owner, stack.attribute, nn.ModuleList())
    try:
        model.to(devices[0])
    finally:
        setattr(stack.owner, stack.attribute, slots)
    ranges = []
    for device, (begin, end) in zip(devices, pairwise(cuts), strict=True):
        if begin:
            move_range(layers[begin:end], device)
        else:
            nn.ModuleList(layers[:end]).to(device)
        ranges.append(PlacedRange(device, split.first + begin, split.first + end, sum(sizes[begin:end])))
    return ranges


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights, with those of adapters."""
    return sum(map(stored_bytes, module.parameters())) + adapter_bytes(module)


def _cuts(layers: Sequence[nn.Module], split: Split, config: Any) -> Iterator[int]:
    """The layers before which a body may be cut, counted from its first: those that no earlier layer is tied to."""
    together = [(link.source - split.first, link.user - split.first) for link in find_links(config)]
    owners: defaultdict[int, list[int]] = defaultdict(list)
    for index, layer in enumerate(layers):
        for parameter in layer.parameters():
            owners[id(parameter)].append(index)
    # Layers that share a weight.
    together += [(min(own), max(own)) for own in owners.values() if min(own) < max(own)]
    for cut in range(1, len(layers)):
        if not any(first < cut <= last for first, last in together):
            yield cut


def divide(sizes: Sequence[int], rooms: Sequence[int], cuts: Collection[int]) -> list[int]:
    """Divides a row of layers into contiguous parts, so that the parts take about the same share of their rooms.

    The sum of the squares of the shares is the least that there is.

    Args:
        sizes: bytes of each layer.
        rooms: most bytes of each part.
        cuts: before which layers the row may be cut.

    Returns:
        Before which layers it is cut, ascending: one less than there are parts.

    Raises:
        ConfigError: there are fewer places to cut than are needed.
        ModelError: the parts do not fit into their rooms.
    """
    if len(cuts) + 1 < len(rooms):
        why = "" if len(cuts) + 1 == len(sizes) else ", some of which have to be on the device of others,"
        raise ConfigError(
            f"{len(sizes)} layers{why} cannot be laid over {len(rooms)} devices: name at most {len(cuts) + 1}"
        )
    before = [0, *accumulate(sizes)]
    # The least cost of the layers before each place with as many parts as there were rooms so far, and the cuts.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for number, room in enumerate(rooms):
        ends = [len(sizes)] if number == len(rooms) - 1 else sorted(cuts)
        found: dict[int, tuple[float, list[int]]] = {}
        for end in ends:
            choices = [
                (cost + ((before[end] - before[begin]) / max(1, room)) ** 2, chosen, begin)
                for begin, (cost, chosen) in best.items()
                if begin < end and before[end] - before[begin] <= room
            ]
            if choices:
                cost, chosen, begin = min(choices)
                found[end] = cost, [*chosen, begin]
        best = found
    if len(sizes) not in best:
        raise ModelError(
            f"{before[-1]:,} bytes of weights do not fit, in {len(rooms)} ranges of layers, on devices with room "
            f"for {', '.join(f'{room:,}' for room in rooms)}: serve fewer layers (--layers), name more devices, or "
            "use --dtype bfloat16 or --device cpu"
        )
    return best[len(sizes)][1][1:]


def move_range(layers: Sequence[nn.Module], device: torch.device) -> None:
    """Moves layers to a device, and their arguments, in each forward, too."""
    arguments = _Arguments(device)
    for index, layer in enumerate(layers):
        layer.to(device)
        if index == 0:
            layer.register_forward_pre_hook(lambda *_: arguments.forget())
        layer.register_forward_pre_hook(arguments.move, with_kwargs=True)
    layers[-1].register_forward_hook(lambda *_: arguments.forget(), always_call=True)


class _Arguments:
    """What the layers of a range are handed in one forward, on their device. Each tensor is copied once.

    Args:
        device: the layers'.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # By the identity of the original, which is kept so that no other object gets it.
        self._copies: dict[int, tuple[Any, Any]] = {}

    def forget(self) -> None:
        """Drops the copies of a forward that has ended, or failed."""
        self._copies.clear()

    def move(self, _layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a layer, on its device."""
        return (
            tuple(self._moved(value) for value in args),
            {name: self._moved(value) for name, value in kwargs.items()},
        )

    def _moved(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.device == self._device:
                return value
        elif type(value) not in (tuple, list, dict):
            return value
        if id(value) not in self._copies:
            self._copies[id(value)] = value, self._copy(value)
        return self._copies[id(value)][1]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(self._device, non_blocking=True)
        if isinstance(value, dict):
            moved = {name: self._moved(item) for name, item in value.items()}
            return value if all(moved[name] is item for name, item in value.items()) else moved
        items = [self._moved(item) for item in value]
        if all(one is other for one, other in zip(items, value, strict=True)):
            return value
        return tuple(items) if isinstance(value, tuple) else items

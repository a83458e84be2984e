"""What sequences take of each device's memory, where the layers of a range are on several devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from split_common.models.cache_layers import key_bytes, state_bytes


@dataclass(frozen=True)
class Footprint:
    """Bytes that sequences take, by device.

    Args:
        token: of a token's keys and values.
        state: of a sequence's states.
    """

    token: Mapping[torch.device, int]
    state: Mapping[torch.device, int]

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values on all devices."""
        return sum(self.token.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of a sequence's states on all devices."""
        return sum(self.state.values())

    def share(self, device: torch.device) -> float:
        """The largest part of memory for keys, values and states that is on a device, whatever it holds.

        All of it may be taken by tokens, or by states.
        """
        parts = ((self.token, self.token_bytes), (self.state, self.state_bytes))
        return max((bytes_.get(device, 0) / whole for bytes_, whole in parts if whole), default=0.0)

    def total(self, rooms: Mapping[torch.device, int]) -> int:
        """Bytes for keys, values and states in all, of which no device gets more than its room."""
        used = {device: share for device in rooms if (share := self.share(device))}
        return min((int(rooms[device] / share) for device, share in used.items()), default=sum(rooms.values()))


def measure_footprint(layers: Sequence[Any], devices: Sequence[torch.device], tokens: int) -> Footprint:
    """The footprint of a sequence that was run.

    Args:
        layers: what each layer of the range keeps of it, as transformers' cache layers.
        devices: of each of these layers.
        tokens: how many tokens the sequence has.
    """
    token: Counter[torch.device] = Counter()
    state: Counter[torch.device] = Counter()
    seen: set[int] = set()
    for layer, device in zip(layers, devices, strict=True):
        if id(layer) not in seen:
            seen.add(id(layer))
            token[device] += key_bytes(layer)
            state[device] += state_bytes(layer)
    return Footprint({device: bytes_ // tokens for device, bytes_ in token.items()}, state)

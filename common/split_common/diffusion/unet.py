"""Where a UNet is cut, and loading one side of it.

A UNet of n levels is a row of 2n + 1 blocks: down 0 … n-1, the middle one, up 0 … n-1. The body is the blocks
`[d, 2n + 1 - d)`: all from level d on. So the cut on the way down lies just behind a downsampler, whose output is
also the one skip connection that crosses it. The body's last block leaves its upsampler to the device: what returns
is a quarter as large before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import msgspec
import torch
from torch import nn

from split_common.checkpoint import Checkpoint
from split_common.errors import ConfigError, InvalidSplit, MissingTensor, ModelError, UnsupportedArchitecture
from split_common.part import Side, read_tensors
from split_common.split import Split

Cut = Literal["C", "A"]

#: How many levels of each cut are the device's. C leaves the device about a tenth of SDXL's computing, A a third.
CUTS: dict[str, int] = {"C": 1, "A": 2}

_CLASS = "UNet2DConditionModel"
#: Blocks that are called as the body calls them.
_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn"}


@dataclass
class UNetPlan:
    """What a checkpoint of a UNet is, before any weight is read. Made by `plan_unet`."""

    checkpoint: Checkpoint
    config: dict[str, Any]

    @property
    def channels(self) -> list[int]:
        """Channels of each level."""
        return list(self.config["block_out_channels"])

    @property
    def levels(self) -> int:
        return len(self.channels)

    @property
    def blocks(self) -> int:
        return 2 * self.levels + 1

    @cached_property
    def embedding(self) -> int:
        """Width of the embedding of a step's time and of the added conditions."""
        return int(self.config.get("time_embedding_dim") or self.channels[0] * 4)

    def skips(self, level: int) -> int:
        """Skip connections that the blocks of a level make on the way down."""
        layers = self.config.get("layers_per_block", 2)
        own = layers if isinstance(layers, int) else layers[level]
        return int(own) + (level < self.levels - 1)

    def split(self, cut: str) -> Split:
        """The body of a cut by name. Raises ConfigError, InvalidSplit."""
        if cut not in CUTS:
            raise ConfigError(f"{cut!r} is no cut: take {' or '.join(CUTS)}")
        if CUTS[cut] >= self.levels:
            raise InvalidSplit(f"{self.checkpoint.name} has {self.levels} levels: cut {cut} leaves no body")
        return Split(self.blocks, CUTS[cut], self.blocks - CUTS[cut])

    def check(self, split: Split) -> Split:
        """Raises InvalidSplit for a body that does not begin and end at the same level."""
        if not (0 < split.first < self.levels and split.first == split.layers - split.last):
            raise InvalidSplit(
                f"blocks {split} of {self.blocks} are no body: take as many from each end, like 1:-1"
            )
        return split

    def in_body(self, tensor: str, split: Split) -> bool:
        """Whether a tensor is the worker's."""
        kind, _, rest = tensor.partition(".")
        index, _, inner = rest.partition(".")
        if kind == "mid_block":
            return True
        if kind == "down_blocks":
            return int(index) in split.body
        if kind == "up_blocks":
            block = self.levels + 1 + int(index)
            return block in split.body and not (block == split.last - 1 and inner.startswith("upsamplers."))
        return False

    def own_tensors(self, split: Split, side: Side) -> list[str]:
        """Names of the tensors that a side loads."""
        return [name for name in self.checkpoint.tensor_names if self.in_body(name, split) == (side == "worker")]

    def skip_shapes(self, split: Split, height: int, width: int) -> list[tuple[int, int, int]]:
        """`[channels, height, width]` of the skips that the body uses, for an input of this size: its own input's
        first, then those of its own blocks; and at last that of its middle block's output."""
        shapes = [(self.channels[split.first - 1], height, width)]
        for level in range(split.first, self.levels):
            layers = self.skips(level) - (level < self.levels - 1)
            shapes += [(self.channels[level], height, width)] * layers
            if level < self.levels - 1:
                height, width = (height + 1) // 2, (width + 1) // 2
                shapes.append((self.channels[level], height, width))
        return [*shapes, (self.channels[-1], height, width)]


def is_unet(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a diffusion model's UNet."""
    return _config(checkpoint).get("_class_name") == _CLASS


def plan_unet(checkpoint: Checkpoint) -> UNetPlan:
    """Raises UnsupportedArchitecture when it is no UNet, or one with blocks that cannot be split."""
    config = _config(checkpoint)
    if config.get("_class_name") != _CLASS:
        raise UnsupportedArchitecture(f"{checkpoint.name} is no {_CLASS}")
    channels = config.get("block_out_channels")
    if not (isinstance(channels, list) and channels and all(isinstance(count, int) for count in channels)):
        raise ModelError(f"{checkpoint.name}: config.json names no channels of its blocks")
    kinds = {
        *config.get("down_block_types", ()),
        *config.get("up_block_types", ()),
        config.get("mid_block_type") or "UNetMidBlock2DCrossAttn",
    }
    if strange := sorted(kinds - _BLOCKS):
        raise UnsupportedArchitecture(f"{checkpoint.name}: blocks of type {strange[0]} cannot be split")
    if config.get("attention_type", "default") != "default":
        raise UnsupportedArchitecture(f"{checkpoint.name}: attention of type {config['attention_type']!r} (GLIGEN)")
    return UNetPlan(checkpoint, config)


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        return msgspec.json.decode(checkpoint.config_bytes, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{checkpoint.name}: config.json is malformed: {error}") from None


def build_unet(plan: UNetPlan, unet_class: Any) -> Any:
    """The UNet without memory for its weights (on `meta`)."""
    try:
        with torch.device("meta"):
            return unet_class.from_config(plan.config)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UnsupportedArchitecture(f"{plan.checkpoint.name} cannot be built: {error}") from None


def load_weights(module: nn.Module, plan: UNetPlan, split: Split, side: Side, dtype: torch.dtype | None) -> None:
    """Reads a side's tensors into a module that was built on `meta` and has just that side's parameters.

    Args:
        dtype: of the parameters; None keeps the checkpoint's.

    Raises:
        MissingTensor: the checkpoint lacks one.
        ModelError: its tensors do not fit the module.
    """
    state = read_tensors(plan.checkpoint, plan.own_tensors(split, side))
    if missing := sorted(module.state_dict().keys() - state.keys()):
        raise MissingTensor(f"{plan.checkpoint.name} lacks the tensor {missing[0]}")
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(f"{plan.checkpoint.name}: its tensors do not make the model: {reason}") from None
    module.eval().requires_grad_(False)

"""UNets: where they are cut, and their body.

A UNet of n levels has 2n + 1 blocks: down 0 … n-1, the middle block, up 0 … n-1. The body is the blocks
`[d, 2n + 1 - d)`, that is, all levels from d on. On the way down, the cut lies behind a downsampler, whose output
is also the only skip connection that crosses the cut. The upsampler of the body's last block runs on the device,
because the states before it are a quarter as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import nn

from split_common.errors import InvalidSplit, Malformed, ModelError, UnsupportedArchitecture
from split_common.models.denoisers.sizes import LATENT_PIXELS
from split_common.models.denoisers.spec import (
    DenoiserBlocks,
    DenoiserSpec,
    StepConditioning,
    load_weights,
)
from split_common.models.split import Split

#: The number of levels that each cut leaves to the device.
_LEVELS = {"C": 1, "A": 2}

#: Types of blocks that `UNetBlocks.forward` knows how to call.
_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn"}


@dataclass
class UNetSpec(DenoiserSpec):
    """A UNet.

    A step's tensors are the states `[rows, channels, height, width]`, the embedding of the time and of the added
    conditions `[rows, width]`, and the residuals of a ControlNet, if there is one, as in `skip_shapes`. The
    conditioning is the text's embeddings `[rows, tokens, width]` and, with an IP-Adapter, those of images
    `[rows, images, tokens, width]` with a scale for each of `body_attentions`.

    Raises:
        ModelError, UnsupportedArchitecture: the configuration is malformed, or has blocks that do not run split.
    """

    class_name: ClassVar[str] = "UNet2DConditionModel"
    component: ClassVar[str] = "unet"

    def __post_init__(self) -> None:
        name, config = self.checkpoint.name, self.config
        channels = config.get("block_out_channels")
        if not (isinstance(channels, list | tuple) and channels and all(isinstance(c, int) for c in channels)):
            raise ModelError(f"{name}: config.json must list its blocks' channels (block_out_channels)")
        kinds = {
            *config.get("down_block_types", ()),
            *config.get("up_block_types", ()),
            config.get("mid_block_type") or "UNetMidBlock2DCrossAttn",
        }
        if strange := sorted(kinds - _BLOCKS):
            raise UnsupportedArchitecture(f"{name}: blocks of type {strange[0]} do not run split")
        if config.get("attention_type", "default") != "default":
            raise UnsupportedArchitecture(
                f"{name}: GLIGEN (attention_type {config['attention_type']!r}) does not run split"
            )

    @property
    def channels(self) -> list[int]:
        """The number of channels of each level."""
        return list(self.config["block_out_channels"])

    @property
    def levels(self) -> int:
        """The number of levels."""
        return len(self.channels)

    @property
    def blocks(self) -> int:
        return 2 * self.levels + 1

    @cached_property
    def embedding(self) -> int:
        """Width of the embedding of the timestep and the added conditions."""
        return int(self.config.get("time_embedding_dim") or self.channels[0] * 4)

    def skips(self, level: int) -> int:
        """The number of skip connections that the blocks of a level produce on the way down."""
        layers = self.config.get("layers_per_block", 2)
        own = layers if isinstance(layers, int) else layers[level]
        return int(own) + (level < self.levels - 1)

    def end_blocks(self, cut: str) -> int:
        return _LEVELS[cut]

    def check(self, split: Split) -> Split:
        """Returns the split. Raises InvalidSplit if the body does not begin and end at the same level."""
        if not (0 < split.first < self.levels and split.first == split.layers - split.last):
            raise InvalidSplit(
                f"blocks {split} of {self.blocks} do not make a body: take as many from each end, like 1:-1"
            )
        return split

    @property
    def adapted(self) -> bool:
        """Whether the checkpoint has an IP-Adapter."""
        return bool(self.checkpoint.adapter_names)

    @cached_property
    def attentions(self) -> list[str]:
        """Names of the modules that attend to embeddings, in the order in which IP-Adapters number them."""
        processors = self.build().attn_processors
        return [name.removesuffix(".processor") for name in processors if not name.endswith("attn1.processor")]

    def body_attentions(self, split: Split) -> list[str]:
        """Those of `attentions` that are in the body, in the same order."""
        return [name for name in self.attentions if self.in_body(name, split)]

    @cached_property
    def _adapter_modules(self) -> dict[str, str]:
        return {
            f"ip_adapter.{2 * index + 1}.to_{kind}_ip.weight": f"{name}.processor.to_{kind}_ip.0.weight"
            for index, name in enumerate(self.attentions)
            for kind in "kv"
        }

    def module_name(self, tensor: str) -> str:
        return self._adapter_modules.get(tensor, tensor) if tensor in self.checkpoint.adapter_names else tensor

    def in_body(self, tensor: str, split: Split) -> bool:
        tensor = self.module_name(tensor)
        kind, _, rest = tensor.partition(".")
        index, _, inner = rest.partition(".")
        if kind == "mid_block":
            return True
        if not index.isdecimal():
            return False
        if kind == "down_blocks":
            return int(index) in split.body
        if kind == "up_blocks":
            block = self.levels + 1 + int(index)
            return block in split.body and not (block == split.last - 1 and inner.startswith("upsamplers."))
        return False

    def step_shapes(self, split: Split, shapes: Sequence[Sequence[int]]) -> list[list[int]]:
        if len(shapes[0]) != 4:
            raise Malformed(f"states of the shape {shapes[0]}: expected [rows, channels, height, width]")
        rows, _, height, width = shapes[0]
        skips = [[rows, *shape] for shape in self.skip_shapes(split, height, width)]
        return [skips[0], [rows, self.embedding], *(skips if len(shapes) > 2 else ())]

    def output_shape(self, split: Split, shapes: Sequence[Sequence[int]]) -> list[int]:
        return [shapes[0][0], self.channels[split.first], *shapes[0][2:]]

    def image_pixels(self, split: Split, shapes: Sequence[Sequence[int]]) -> int:
        _, _, height, width = shapes[0]
        return int(height * width * (LATENT_PIXELS * 2**split.first) ** 2)

    def load_blocks(self, split: Split, dtype: torch.dtype | None = None) -> UNetBlocks:
        return UNetBlocks(self, split, dtype)

    def skip_shapes(self, split: Split, height: int, width: int) -> list[tuple[int, int, int]]:
        """Shapes `[channels, height, width]` of the skips that the body uses, for an input of this size.

        The body's input comes first, then the outputs of its down blocks, then the output of the middle block.
        """
        shapes = [(self.channels[split.first - 1], height, width)]
        for level in range(split.first, self.levels):
            layers = self.skips(level) - (level < self.levels - 1)
            shapes += [(self.channels[level], height, width)] * layers
            if level < self.levels - 1:
                height, width = (height + 1) // 2, (width + 1) // 2
                shapes.append((self.channels[level], height, width))
        return [*shapes, (self.channels[-1], height, width)]


class UNetBlocks(DenoiserBlocks):
    """Runs a UNet's body: the blocks of its lower levels.

    Args:
        spec: the UNet.
        split: the body's blocks.
        dtype: of the parameters; None keeps the checkpoint's.

    Raises:
        ModelError: the body cannot be loaded.
    """

    def __init__(self, spec: UNetSpec, split: Split, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, split)
        unet = spec.build()
        first, levels = split.first, spec.levels
        # Names are the original's: no block is renumbered.
        self.down_blocks = nn.ModuleDict({str(index): unet.down_blocks[index] for index in range(first, levels)})
        self.mid_block = unet.mid_block
        self.up_blocks = nn.ModuleDict({str(index): unet.up_blocks[index] for index in range(levels - first)})
        unet.up_blocks[levels - first - 1].upsamplers = None
        #: Processors of the IP-Adapter, one for each of the body's attentions.
        self._adapters = [self._adapt(name) for name in spec.body_attentions(split)] if spec.adapted else []
        load_weights(self, spec, split, "worker", dtype)
        widths = (p.shape[1] for name, p in self.named_parameters() if name.endswith("attn2.to_k.weight"))
        #: Width of the embeddings that the body attends to; None if none of its blocks does.
        self._width: int | None = next(widths, None)

    def _adapt(self, name: str) -> Any:
        """Makes an attention of the body also attend to the IP-Adapter's images. Returns its processor."""
        from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

        attention: Any = self.get_submodule(name)
        with torch.device("meta"):
            processor = IPAdapterAttnProcessor2_0(attention.inner_dim, attention.cross_attention_dim)
        attention.set_processor(processor)
        return processor

    def check_conditioning(self, shapes: Sequence[Sequence[int]], scales: int) -> None:
        if len(shapes[0]) != 3 or self._width not in (None, shapes[0][-1]):
            raise Malformed(f"embeddings of the shape {shapes[0]}: the model's width is {self._width}")
        images = shapes[1:]
        if len(images) > bool(self._adapters) or scales != len(images) * len(self._adapters):
            raise Malformed(f"{len(images)} embeddings of images and {scales} scales do not fit the IP-Adapter")
        if images and (len(images[0]) != 4 or [images[0][0], images[0][-1]] != [shapes[0][0], shapes[0][-1]]):
            raise Malformed(f"embeddings {images[0]} of images do not match those of the text, {shapes[0]}")

    def check_step(self, shapes: Sequence[Sequence[int]], conditioning: StepConditioning) -> None:
        if not conditioning.tensors:
            raise Malformed("a step of a UNet must name its embeddings")

    def forward(self, tensors: Sequence[torch.Tensor], conditioning: StepConditioning) -> torch.Tensor:
        """The output of the body's last block, before its upsampler."""
        sample, embedding, *residuals = tensors
        context: Any = conditioning.tensors[0]
        if self._adapters:
            images = list(conditioning.tensors[1:])
            for processor, scale in zip(
                self._adapters, conditioning.scales or [0.0] * len(self._adapters), strict=True
            ):
                processor.scale = [scale]
            # The embeddings of images are not read if the scales are 0.
            context = context, images or [context]
        skips = [sample]
        for block in self.down_blocks.values():
            sample, made = block(sample, embedding, **_context(block, context))
            skips += made
        if residuals:
            skips = [skip + residual for skip, residual in zip(skips, residuals[:-1], strict=True)]
        if self.mid_block is not None:
            sample = self.mid_block(sample, embedding, **_context(self.mid_block, context))
        if residuals:
            sample = sample + residuals[-1]
        for block in self.up_blocks.values():
            count = len(cast(nn.ModuleList, block.resnets))
            own = skips[-count:]
            del skips[-count:]
            size = _upsampled(sample, skips[-1]) if skips else None
            sample = block(
                hidden_states=sample,
                temb=embedding,
                res_hidden_states_tuple=tuple(own),
                upsample_size=size,
                **_context(block, context),
            )
        return sample


def _context(block: Any, context: Any) -> dict[str, Any]:
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}


def _upsampled(sample: torch.Tensor, skip: torch.Tensor) -> torch.Size | None:
    """The size that a block's output must have to fit the next skip; None if that is twice its input's."""
    wanted = skip.shape[2:]
    return None if [2 * size for size in sample.shape[2:]] == list(wanted) else wanted

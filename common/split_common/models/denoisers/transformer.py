"""Transformer denoisers: where they are cut, and their body.

The blocks attend to the image's and the text's tokens together and update both, so both are states and travel with
each step. The text's original embeddings never travel. For Flux, the positions of the tokens are the conditioning.
The body is any range of blocks that leaves at least one at each end.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from split_common.errors import Malformed, ModelError
from split_common.models.denoisers.sizes import LATENT_PIXELS
from split_common.models.denoisers.spec import (
    DenoiserBlocks,
    DenoiserSpec,
    StepConditioning,
    load_weights,
)
from split_common.models.split import Split

#: Cut A leaves the device one block in this many at each end; cut C leaves a single block.
_SHARE_OF_A = 6

#: Latents of a token, in each direction: SD 3 and Flux both take two.
TOKEN_LATENTS = 2


@dataclass
class TransformerSpec(DenoiserSpec):
    """A transformer denoiser.

    A step's tensors are the image's tokens `[rows, tokens, width]`, the embedding of the time and of the pooled
    text `[rows, width]`, and the text's tokens `[rows, tokens, width]`. The output is the text's tokens and then
    the image's, `[rows, tokens, width]`.

    Raises:
        ModelError: the configuration is malformed.
    """

    component: ClassVar[str] = "transformer"
    #: The stacks of blocks in the order in which they run, and the setting that holds the length of each.
    stacks: ClassVar[dict[str, str]]
    #: Default values of the settings in diffusers.
    defaults: ClassVar[dict[str, int]]

    def __post_init__(self) -> None:
        for name in self.defaults:
            if not isinstance(value := self.setting(name), int) or not 0 <= value < 2**16:
                raise ModelError(f"{self.checkpoint.name}: config.json: {name} is {value!r}")

    def setting(self, name: str) -> int:
        """A setting of the configuration, or its default."""
        return self.config.get(name, self.defaults[name])  # type: ignore[no-any-return]

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return self.setting("num_attention_heads") * self.setting("attention_head_dim")

    @property
    def blocks(self) -> int:
        return sum(map(self.setting, self.stacks.values()))

    def places(self, split: Split) -> list[tuple[str, int]]:
        """The stack of each of the body's blocks, and its index in that stack."""
        places = [(stack, index) for stack, count in self.stacks.items() for index in range(self.setting(count))]
        return places[split.first : split.last]

    def end_blocks(self, cut: str) -> int:
        return 1 if cut == "C" else -(-self.blocks // _SHARE_OF_A)

    def in_body(self, tensor: str, split: Split) -> bool:
        stack, _, rest = tensor.partition(".")
        index = rest.partition(".")[0]
        return index.isdecimal() and (stack, int(index)) in self.places(split)

    def step_shapes(self, split: Split, shapes: Sequence[Sequence[int]]) -> list[list[int]]:
        if len(shapes) != 3 or len(shapes[0]) != 3 or len(shapes[2]) != 3:
            raise Malformed(f"a step of the shapes {shapes}: expected image tokens, an embedding and text tokens")
        rows = shapes[0][0]
        return [[rows, shapes[0][1], self.width], [rows, self.width], [rows, shapes[2][1], self.width]]

    def image_pixels(self, split: Split, shapes: Sequence[Sequence[int]]) -> int:
        # The text's tokens are attended to as well, and so count like the image's.
        return (shapes[0][1] + shapes[2][1]) * (LATENT_PIXELS * TOKEN_LATENTS) ** 2

    def output_shape(self, split: Split, shapes: Sequence[Sequence[int]]) -> list[int]:
        return [shapes[0][0], shapes[0][1] + shapes[2][1], self.width]


class TransformerBlocks(DenoiserBlocks):
    """Runs a transformer's body.

    Args:
        spec: the transformer.
        split: the body's blocks.
        dtype: of the parameters; None keeps the checkpoint's.

    Raises:
        ModelError: the body cannot be loaded.
    """

    per_row = False

    def __init__(self, spec: TransformerSpec, split: Split, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, split)
        model = spec.build()
        blocks: dict[str, nn.ModuleDict] = {}
        for stack, index in spec.places(split):
            # Names are the original's: no block is renumbered.
            blocks.setdefault(stack, nn.ModuleDict())[str(index)] = getattr(model, stack)[index]
        for stack, modules in blocks.items():
            self.add_module(stack, modules)
        self._blocks = [block for modules in blocks.values() for block in modules.values()]
        load_weights(self, spec, split, "worker", dtype)

    def options(self, conditioning: StepConditioning) -> dict[str, Any]:
        """Further arguments of the blocks."""
        raise NotImplementedError

    def forward(self, tensors: Sequence[torch.Tensor], conditioning: StepConditioning) -> torch.Tensor:
        image, embedding, text = tensors
        options = self.options(conditioning)
        for block in self._blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=embedding, **options)
        return torch.cat((text, image), 1)


@dataclass
class SD3Spec(TransformerSpec):
    """The transformer of Stable Diffusion 3 or 3.5. It takes no conditioning."""

    class_name: ClassVar[str] = "SD3Transformer2DModel"
    stacks: ClassVar[dict[str, str]] = {"transformer_blocks": "num_layers"}
    defaults: ClassVar[dict[str, int]] = {"num_layers": 18, "num_attention_heads": 18, "attention_head_dim": 64}

    def load_blocks(self, split: Split, dtype: torch.dtype | None = None) -> TransformerBlocks:
        return SD3Blocks(self, split, dtype)


class SD3Blocks(TransformerBlocks):
    def check_conditioning(self, shapes: Sequence[Sequence[int]], scales: int) -> None:
        raise Malformed("conditioning with tensors for a model that takes none")

    def options(self, conditioning: StepConditioning) -> dict[str, Any]:
        return {}


@dataclass
class FluxSpec(TransformerSpec):
    """The transformer of Flux. The conditioning is the tokens' positions `[1, tokens, axes]`, the text's first."""

    class_name: ClassVar[str] = "FluxTransformer2DModel"
    stacks: ClassVar[dict[str, str]] = {
        "transformer_blocks": "num_layers",
        "single_transformer_blocks": "num_single_layers",
    }
    defaults: ClassVar[dict[str, int]] = {
        "num_layers": 19,
        "num_single_layers": 38,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
    }

    def load_blocks(self, split: Split, dtype: torch.dtype | None = None) -> TransformerBlocks:
        return FluxBlocks(self, split, dtype)


class FluxBlocks(TransformerBlocks):
    def __init__(self, spec: TransformerSpec, split: Split, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, split, dtype)
        self._positions = spec.build().pos_embed

    def check_conditioning(self, shapes: Sequence[Sequence[int]], scales: int) -> None:
        axes = len(self._positions.axes_dim)
        if scales or len(shapes) != 1 or len(shapes[0]) != 3 or (shapes[0][0], shapes[0][2]) != (1, axes):
            raise Malformed(
                f"conditioning of the shapes {shapes}: expected the tokens' positions [1, tokens, {axes}]"
            )

    def check_step(self, shapes: Sequence[Sequence[int]], conditioning: StepConditioning) -> None:
        tokens = shapes[0][1] + shapes[2][1]
        if not conditioning.tensors or conditioning.tensors[0].shape[1] != tokens:
            raise Malformed(f"a step of {tokens} tokens, whose conditioning does not say where they are")

    def batch_key(self, conditioning: StepConditioning) -> Hashable:
        return conditioning.tensors[0].shape[1], conditioning.tensors[0].float().cpu().numpy().tobytes()

    def options(self, conditioning: StepConditioning) -> dict[str, Any]:
        return {"image_rotary_emb": self._positions(conditioning.tensors[0][0])}

"""Transformer denoisers: where they are cut, and their body.

The blocks attend to the image's and the text's tokens together and update both, so both are the states of a step.
The text's embeddings never travel. For Flux, the positions of the tokens do. The body is any range of blocks that
leaves some at each end.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from split_common.errors import Malformed, ModelError
from split_common.models.denoisers.spec import DenoiserBlocks, DenoiserSpec, StepConditioning, load_weights
from split_common.models.split import Split

#: Cut A leaves the device one block in this many at each end; cut C leaves a single block.
_SHARE_OF_A = 6


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
    #: The stacks of blocks in order of execution, and the setting with the length of each.
    stacks: ClassVar[dict[str, str]]
    #: Defaults of the settings in diffusers.
    defaults: ClassVar[dict[str, int]]

    def __post_init__(self) -> None:
        for name in self.defaults:
            if not isinstance(value := self.setting(name), int) or not 0 <= value < 2**16:
                raise ModelError(f"{self.checkpoint.name}: config.json: {name} is {value!r}")

    def setting(self, name: str) -> int:
        return self.config.get(name, self.defaults[name])  # type: ignore[no-any-return]

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return self.setting("num_attention_heads") * self.setting("attention_head_dim")

    @property
    def blocks(self) -> int:
        return sum(map(self.setting, self.stacks.values()))

    def places(self, split: Split) -> list[tuple[str, int]]:
        """The body's blocks: the stack of each, and its index there."""
        places = [(stack, index) for stack, count in self.stacks.items() for index in range(self.setting(count))]
        return places[split.first : split.last]

    def ends(self, cut: str) -> int:
        return 1 if cut == "C" else -(-self.blocks // _SHARE_OF_A)

    def in_body(self, tensor: str, split: Split) -> bool:
        stack, _, rest = tensor.partition(".")
        index = rest.partition(".")[0]
        return index.isdecimal() and (stack, int(index)) in self.places(split)

    def step_shapes(self, split: Split, shapes: Sequence[Sequence[int]]) -> list[list[int]]:
        if len(shapes) != 3 or len(shapes[0]) != 3 or len(shapes[2]) != 3:
            raise Malformed(f"states of the shapes {shapes}: tokens have rows, a number and a width")
        rows = shapes[0][0]
        return [[rows, shapes[0][1], self.width], [rows, self.width], [rows, shapes[2][1], self.width]]

    def output_shape(self, split: Split, shapes: Sequence[Sequence[int]]) -> list[int]:
        return [shapes[0][0], shapes[0][1] + shapes[2][1], self.width]


class TransformerMiddle(DenoiserBlocks):
    """Runs a transformer's body.

    Args:
        plan: the transformer.
        split: the body's blocks.
        dtype: of the parameters; None keeps the checkpoint's.

    Raises:
        ModelError: the body cannot be loaded.
    """

    per_row = False

    def __init__(self, plan: TransformerSpec, split: Split, dtype: torch.dtype | None = None) -> None:
        super().__init__(plan, split)
        model = plan.build()
        blocks: dict[str, nn.ModuleDict] = {}
        for stack, index in plan.places(split):
            # Names are the original's: no block is renumbered.
            blocks.setdefault(stack, nn.ModuleDict())[str(index)] = getattr(model, stack)[index]
        for stack, modules in blocks.items():
            self.add_module(stack, modules)
        self._blocks = [block for modules in blocks.values() for block in modules.values()]
        load_weights(self, plan, split, "worker", dtype)

    def options(self, job: StepConditioning) -> dict[str, Any]:
        """Further arguments of the blocks."""
        raise NotImplementedError

    def forward(self, tensors: Sequence[torch.Tensor], job: StepConditioning) -> torch.Tensor:
        image, embedding, text = tensors
        options = self.options(job)
        for block in self._blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=embedding, **options)
        return torch.cat((text, image), 1)


@dataclass
class SD3Spec(TransformerSpec):
    """The transformer of Stable Diffusion 3 or 3.5. Its jobs have no tensors."""

    class_name: ClassVar[str] = "SD3Transformer2DModel"
    stacks: ClassVar[dict[str, str]] = {"transformer_blocks": "num_layers"}
    defaults: ClassVar[dict[str, int]] = {"num_layers": 18, "num_attention_heads": 18, "attention_head_dim": 64}

    def middle(self, split: Split, dtype: torch.dtype | None = None) -> TransformerMiddle:
        return SD3Middle(self, split, dtype)


class SD3Middle(TransformerMiddle):
    def check_job(self, shapes: Sequence[Sequence[int]], scales: int) -> None:
        raise Malformed("a job with tensors, of a model that calls for none")

    def options(self, job: StepConditioning) -> dict[str, Any]:
        return {}


@dataclass
class FluxSpec(TransformerSpec):
    """The transformer of Flux. A job's tensor `[1, tokens, axes]` has the tokens' positions, the text's first."""

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

    def middle(self, split: Split, dtype: torch.dtype | None = None) -> TransformerMiddle:
        return FluxMiddle(self, split, dtype)


class FluxMiddle(TransformerMiddle):
    def __init__(self, plan: TransformerSpec, split: Split, dtype: torch.dtype | None = None) -> None:
        super().__init__(plan, split, dtype)
        self._positions = plan.build().pos_embed

    def check_job(self, shapes: Sequence[Sequence[int]], scales: int) -> None:
        axes = len(self._positions.axes_dim)
        if scales or len(shapes) != 1 or len(shapes[0]) != 3 or (shapes[0][0], shapes[0][2]) != (1, axes):
            raise Malformed(f"a job of shapes {shapes}: it has the places of one row's tokens on {axes} axes")

    def check_step(self, shapes: Sequence[Sequence[int]], job: StepConditioning) -> None:
        tokens = shapes[0][1] + shapes[2][1]
        if not job.tensors or job.tensors[0].shape[1] != tokens:
            raise Malformed(f"a step of {tokens} tokens whose job does not say where they are")

    def together(self, job: StepConditioning) -> Hashable:
        return job.tensors[0].shape[1], job.tensors[0].float().cpu().numpy().tobytes()

    def options(self, job: StepConditioning) -> dict[str, Any]:
        return {"image_rotary_emb": self._positions(job.tensors[0][0])}

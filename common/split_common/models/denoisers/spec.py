"""The interface of denoisers: what is known before weights are read, and the body.

A denoiser is a sequence of blocks. The cut says how many the device keeps at each end; the body is the rest.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from split_common.errors import ConfigError, InvalidSplit, MissingTensor, ModelError, UnsupportedArchitecture
from split_common.models.checkpoint import Checkpoint
from split_common.models.denoisers.sizes import default_max_pixels
from split_common.models.split import Split
from split_common.models.weights import Side, read_tensors

Cut = Literal["C", "A"]

#: Names of cuts. C leaves the device up to a tenth of the computation and A a third, or more for SD 1.5.
CUTS = ("C", "A")


@dataclass
class DenoiserSpec:
    """What a denoiser's checkpoint is, before any weight is read. Made by `registry.read_denoiser_spec`."""

    checkpoint: Checkpoint
    config: dict[str, Any]

    #: The name of the denoiser's class in diffusers.
    class_name: ClassVar[str]
    #: The denoiser's name in a pipeline of diffusers.
    component: ClassVar[str]

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        raise NotImplementedError

    def end_blocks(self, cut: str) -> int:
        """The number of blocks that a cut leaves to the device at each end."""
        raise NotImplementedError

    def in_body(self, tensor: str, split: Split) -> bool:
        """Whether a tensor belongs to the body."""
        raise NotImplementedError

    def step_shapes(self, split: Split, shapes: Sequence[Sequence[int]]) -> list[list[int]]:
        """The shapes that a step's tensors must have. The sizes of the image and the text are taken from `shapes`.

        Args:
            split: the body.
            shapes: those that the step's tensors have; the states come first.

        Raises:
            Malformed: no step has tensors of these shapes.
        """
        raise NotImplementedError

    def output_shape(self, split: Split, shapes: Sequence[Sequence[int]]) -> list[int]:
        """The shape of the body's output for a step with tensors of these shapes."""
        raise NotImplementedError

    @property
    def default_max_pixels(self) -> int:
        """Most pixels of an image that a worker takes by default."""
        return default_max_pixels({**self.config, "_class_name": self.class_name})

    def image_pixels(self, split: Split, shapes: Sequence[Sequence[int]]) -> int:
        """Pixels of one image of a step with tensors of these shapes, which fit the model."""
        raise NotImplementedError

    def load_blocks(self, split: Split, dtype: torch.dtype | None = None) -> DenoiserBlocks:
        """Loads the body.

        Args:
            dtype: of the parameters; None keeps the checkpoint's.

        Raises:
            MissingTensor: the checkpoint lacks a tensor of the body.
            ModelError: the tensors do not fit the configuration.
            UnsupportedArchitecture: diffusers cannot build the model.
        """
        raise NotImplementedError

    def split(self, cut: str) -> Split:
        """The split of a named cut.

        Raises:
            ConfigError: there is no cut of this name.
            InvalidSplit: the cut leaves no body.
        """
        if cut not in CUTS:
            raise ConfigError(f"invalid cut {cut!r}: expected {' or '.join(CUTS)}")
        count = self.end_blocks(cut)
        if 2 * count >= self.blocks:
            raise InvalidSplit(f"{self.checkpoint.name} has {self.blocks} blocks: cut {cut} leaves no body")
        return self.check(Split(self.blocks, count, self.blocks - count))

    def check(self, split: Split) -> Split:
        """Returns the split. Raises InvalidSplit if these blocks cannot be a body."""
        if not 0 < split.first < split.last < split.layers:
            raise InvalidSplit(f"blocks {split} of {self.blocks} leave no body: keep some at each end, like 1:-1")
        return split

    def own_tensors(self, split: Split, side: Side) -> list[str]:
        """Checkpoint names of the tensors that a side loads, an IP-Adapter's included."""
        return [name for name in self.checkpoint.tensor_names if self.in_body(name, split) == (side == "worker")]

    def module_name(self, tensor: str) -> str:
        """The name in the model of a tensor in the checkpoint."""
        return tensor

    def build(self, model_class: Any = None) -> Any:
        """Builds the denoiser on the `meta` device, without memory for weights.

        Args:
            model_class: the class to build; None for that of diffusers.

        Raises:
            UnsupportedArchitecture: the configuration does not suit the class.
        """
        import diffusers

        try:
            with torch.device("meta"):
                return (model_class or getattr(diffusers, self.class_name)).from_config(self.config)
        except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as error:
            raise UnsupportedArchitecture(f"{self.checkpoint.name} cannot be built: {error}") from None


@dataclass(frozen=True)
class StepConditioning:
    """What all steps of an image share: for a UNet the embeddings, for Flux the positions of the tokens.

    The spec's class says which `tensors` these are. `scales` are an IP-Adapter's, one for each of its attentions.
    """

    tensors: tuple[torch.Tensor, ...] = ()
    scales: tuple[float, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class DenoiserBlocks(nn.Module):
    """The body of a denoiser. It is stateless.

    Args:
        spec: the denoiser.
        split: the body's blocks.
    """

    #: Whether each row of a forward has its own row of the conditioning's tensors. If not, all rows share them.
    per_row = True

    def __init__(self, spec: DenoiserSpec, split: Split) -> None:
        super().__init__()
        self.spec, self.split = spec, split

    def check_conditioning(self, shapes: Sequence[Sequence[int]], scales: int) -> None:
        """Raises Malformed if tensors of these shapes, with this many scales, do not fit the model."""
        raise NotImplementedError

    def check_step(self, shapes: Sequence[Sequence[int]], conditioning: StepConditioning) -> None:
        """Raises Malformed if a step's tensors, which fit the model, do not fit its conditioning."""

    def batch_key(self, conditioning: StepConditioning) -> Hashable:
        """Steps whose conditioning has equal keys may share a forward."""
        return tuple(tuple(tensor.shape[1:]) for tensor in conditioning.tensors), conditioning.scales

    def forward(self, tensors: Sequence[torch.Tensor], conditioning: StepConditioning) -> torch.Tensor:
        """The output of the last block for a step's tensors, which the spec lists."""
        raise NotImplementedError


def load_weights(
    module: nn.Module, spec: DenoiserSpec, split: Split, side: Side, dtype: torch.dtype | None
) -> None:
    """Loads a side's tensors into a module that was built on `meta` with only that side's parameters.

    The device leaves out an IP-Adapter's tensors, which its pipeline loads later.

    Args:
        dtype: of the parameters; None keeps the checkpoint's.

    Raises:
        MissingTensor: the checkpoint lacks a tensor of this side.
        ModelError: the tensors do not fit the module.
        UnsupportedArchitecture: the module needs a buffer that no checkpoint holds.
    """
    name = spec.checkpoint.name
    own = spec.own_tensors(split, side)
    if side == "device":
        own = [key for key in own if key not in spec.checkpoint.adapter_names]
    tensors = read_tensors(spec.checkpoint, own)
    state = {spec.module_name(key): tensor for key, tensor in tensors.items()}
    if missing := sorted(module.state_dict().keys() - state.keys()):
        raise MissingTensor(f"{name} lacks the tensor {missing[0]}")
    if dtype is None and spec.checkpoint.adapter_names:
        dtype = next(iter(state.values())).dtype
    if dtype is not None:
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(f"{name}: its tensors do not make the model: {reason}") from None
    if unset := [key for key, buffer in module.named_buffers() if buffer.is_meta]:
        raise UnsupportedArchitecture(f"{name}: the checkpoint does not say what {unset[0]} is")
    module.eval().requires_grad_(False)

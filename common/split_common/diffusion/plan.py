"""A denoiser before any weight is read, and the interface of its body: what all kinds of denoisers have in common.

A denoiser is a row of blocks. The device has as many at each end as the cut leaves it; the body is the rest.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from split_common.checkpoint import Checkpoint
from split_common.errors import ConfigError, InvalidSplit, MissingTensor, ModelError, UnsupportedArchitecture
from split_common.part import Side, read_tensors
from split_common.split import Split

Cut = Literal["C", "A"]

#: The cuts by name. C leaves the device a tenth of the computing or less, A a third; of SD 1.5 it is more.
CUTS = ("C", "A")


@dataclass
class ImagePlan:
    """What a checkpoint of a denoiser is. Made by `split_common.diffusion.kinds.plan_image`."""

    checkpoint: Checkpoint
    config: dict[str, Any]

    #: What the class is called in diffusers, and the part of a pipeline that it is.
    class_name: ClassVar[str]
    component: ClassVar[str]

    @property
    def blocks(self) -> int:
        raise NotImplementedError

    def ends(self, cut: str) -> int:
        """Blocks at each end that a cut leaves to the device."""
        raise NotImplementedError

    def in_body(self, tensor: str, split: Split) -> bool:
        """Whether a tensor is the worker's."""
        raise NotImplementedError

    def step_shapes(self, split: Split, shapes: Sequence[Sequence[int]]) -> list[list[int]]:
        """Shapes that a step's tensors must have, by that of the first of those that were sent, the states.

        Raises:
            Malformed: no step's tensors are like these.
        """
        raise NotImplementedError

    def output_shape(self, split: Split, shapes: Sequence[Sequence[int]]) -> list[int]:
        """Shape of the body's output, for a step's tensors of these shapes."""
        raise NotImplementedError

    def middle(self, split: Split, dtype: torch.dtype | None = None) -> Middle:
        """Loads the body. Raises ModelError."""
        raise NotImplementedError

    def split(self, cut: str) -> Split:
        """The body of a cut by name. Raises ConfigError, InvalidSplit."""
        if cut not in CUTS:
            raise ConfigError(f"invalid cut {cut!r}: expected {' or '.join(CUTS)}")
        ends = self.ends(cut)
        if 2 * ends >= self.blocks:
            raise InvalidSplit(f"{self.checkpoint.name} has {self.blocks} blocks: cut {cut} leaves no body")
        return self.check(Split(self.blocks, ends, self.blocks - ends))

    def check(self, split: Split) -> Split:
        """Raises InvalidSplit for blocks that cannot be a body."""
        if not 0 < split.first < split.last < split.layers:
            raise InvalidSplit(f"blocks {split} of {self.blocks} leave no body: keep some at each end, like 1:-1")
        return split

    def own_tensors(self, split: Split, side: Side) -> list[str]:
        """Names of the tensors that a side has to have; the device loads an adapter's when its pipeline does."""
        return [name for name in self.checkpoint.tensor_names if self.in_body(name, split) == (side == "worker")]

    def module_name(self, tensor: str) -> str:
        """What the model calls a tensor of the checkpoint."""
        return tensor

    def build(self, model_class: Any = None) -> Any:
        """The denoiser without memory for its weights (on `meta`), of a class of its own if need be."""
        import diffusers

        try:
            with torch.device("meta"):
                return (model_class or getattr(diffusers, self.class_name)).from_config(self.config)
        except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as error:
            raise UnsupportedArchitecture(f"{self.checkpoint.name} cannot be built: {error}") from None


@dataclass(frozen=True)
class Job:
    """What a body has to know of an image beside its steps, for each row of a step.

    `tensors` are what the kind of denoiser calls for; `scales` are an IP-Adapter's, one for each attention to it.
    """

    tensors: tuple[torch.Tensor, ...] = ()
    scales: tuple[float, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class Middle(nn.Module):
    """The body of a denoiser. It keeps nothing from one call to the next.

    Args:
        plan: the denoiser.
        split: the body's blocks.
    """

    #: Whether each row of a forward has rows of a job's tensors of its own. If not, all rows share them.
    per_row = True

    def __init__(self, plan: ImagePlan, split: Split) -> None:
        super().__init__()
        self.plan, self.split = plan, split

    def check_job(self, shapes: Sequence[Sequence[int]], scales: int) -> None:
        """Raises Malformed for tensors and scales of a job that are of another model."""
        raise NotImplementedError

    def check_step(self, shapes: Sequence[Sequence[int]], job: Job) -> None:
        """Raises Malformed for tensors of a step, of shapes that fit the plan, that do not fit the job."""

    def together(self, job: Job) -> Hashable:
        """What two jobs must agree in for their steps to share a forward."""
        return tuple(tuple(tensor.shape[1:]) for tensor in job.tensors), job.scales

    def forward(self, tensors: Sequence[torch.Tensor], job: Job) -> torch.Tensor:
        """The output of the body's last block for a step's tensors: states, embedding of the time, and more."""
        raise NotImplementedError


def load_weights(module: nn.Module, plan: ImagePlan, split: Split, side: Side, dtype: torch.dtype | None) -> None:
    """Reads a side's tensors into a module that was built on `meta` and has just that side's parameters.

    Args:
        dtype: of the parameters; None keeps the checkpoint's.

    Raises:
        MissingTensor: the checkpoint lacks one.
        ModelError: its tensors do not fit the module.
    """
    name = plan.checkpoint.name
    own = plan.own_tensors(split, side)
    if side == "device":
        own = [key for key in own if key not in plan.checkpoint.adapter_names]
    tensors = read_tensors(plan.checkpoint, own)
    state = {plan.module_name(key): tensor for key, tensor in tensors.items()}
    if missing := sorted(module.state_dict().keys() - state.keys()):
        raise MissingTensor(f"{name} lacks the tensor {missing[0]}")
    if dtype is None and plan.checkpoint.adapter_names:
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

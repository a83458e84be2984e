"""What all split denoisers have in common: loading the device's blocks, and calling the body."""

from __future__ import annotations

import inspect
import threading
from pathlib import Path
from typing import Any, Self

import diffusers
import torch

from split_common import payloads
from split_common.checkpoint import Checkpoint
from split_common.diffusion.kinds import plan_image
from split_common.diffusion.plan import ImagePlan, load_weights
from split_common.errors import ConfigError, UnsupportedArchitecture, UnsupportedFeature
from split_common.manifest import find_manifest
from split_common.split import Split
from split_common.tensors import dtype_name, parse_dtype
from split_common.transport import DEFAULT_BROKER
from split_device.diffusion.reuse import Base, Reuse
from split_device.diffusion.saving import CODECS, check_reuse
from split_device.diffusion.session import ImageSession, Inputs
from split_device.joining import Joined, Member
from split_device.sessions.client import PATIENCE, STEP_TIMEOUT


class SplitDenoiser(Joined):
    """A denoiser of diffusers with its body on a worker. Subclasses derive from the original class as well.

    Text encoders, scheduler, noise, VAE, and the denoiser's first and last blocks are the device's.
    """

    _plan: ImagePlan
    #: What the body's output is added to, if to anything.
    _base: Base | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        broker: str = DEFAULT_BROKER,
        cut: str = "C",
        codec: str = "none",
        reuse: float = 1,
        ip_adapter: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        keys: str | Path | None = None,
        member: str | None = None,
        timeout: float = 10.0,
        patience: float = PATIENCE,
        step_timeout: float = STEP_TIMEOUT,
    ) -> Self:
        """Loads the device's blocks, and joins the queue.

        Args:
            path: the directory of a pipeline, or of its denoiser, in safetensors format.
            broker: the queue, as for `SplitModelForCausalLM`.
            cut: "C" leaves the device the blocks of a UNet's first level, or a transformer's first and last block;
                "A" those of the first two levels, or a sixth of the blocks at each end.
            codec: how states travel: "none" (as they are), "fp16", "int8" or "int4" (with scales for each channel
                of a UNet, for each token of a transformer).
            reuse: from 1, call the worker at every step of this number only; below 1, only when the body's input
                has changed by more than this share since the last call. Its output is reused between. 1 is exact.
            ip_adapter: the safetensors file of the IP-Adapter that the pipeline will load (`load_ip_adapter`).
                Workers must serve the model with the same one.
            dtype: of parameters and states: "auto" (the checkpoint's), "float32", "bfloat16", "float16".
            keys, member, timeout, patience, step_timeout: as for `SplitModelForCausalLM`.

        Raises:
            UnknownModel, UnsupportedArchitecture, InvalidSplit, MissingTensor, TensorMismatch: of the model.
            KeysError, ConfigError: of the fleet or an argument.
            BrokerUnreachable: the broker did not answer in time.
        """
        if codec not in CODECS:
            raise ConfigError(f"{codec!r} is no codec: take {', '.join(CODECS)}")
        check_reuse(reuse)
        device = Member.find(broker, keys, member)
        plan = plan_image(Checkpoint.resolve(path, ip_adapter=ip_adapter))
        if not issubclass(cls, getattr(diffusers, plan.class_name)):
            raise UnsupportedArchitecture(f"{plan.checkpoint.name} is a {plan.class_name}")
        split = plan.split(cut)
        manifest = find_manifest(device.fleet, plan.checkpoint, plan.own_tensors(split, "device"))
        model: Self = plan.build(cls)
        model._cut(plan, split)
        load_weights(model, plan, split, "device", parse_dtype(dtype))  # type: ignore[arg-type]
        client = device.join(
            manifest,
            split,
            dtype_name(model.dtype),  # type: ignore[attr-defined]
            timeout=timeout,
            patience=patience,
            step_timeout=step_timeout,
            cut=f"--cut {cut}" + (f" --ip-adapter {ip_adapter}" if ip_adapter is not None else ""),
        )
        model._belong(client, split)
        model._plan, model._codec, model._reuse = plan, CODECS[codec], reuse
        # A session belongs to one thread.
        model._threads = threading.local()
        return model

    def _cut(self, plan: ImagePlan, split: Split) -> None:
        """Puts slots in the place of the body's blocks."""
        raise NotImplementedError

    _codec: payloads.Codec | None
    _reuse: float
    _threads: threading.local

    def pipeline_options(self) -> dict[str, Any]:
        """What a pipeline's `from_pretrained` is told so that this denoiser is its own."""
        dtype: torch.dtype = self.dtype  # type: ignore[attr-defined]
        return {self._plan.component: self, "dtype": dtype, "variant": self._plan.checkpoint.variant}

    @property
    def session(self) -> ImageSession:
        """The session of this thread; another one may `abandon` it."""
        mine = self._threads
        if not hasattr(mine, "session"):
            mine.session = ImageSession(self._client, self._plan, self.split, self._codec)
            mine.reuse = Reuse(self._reuse, self._base)
        session: ImageSession = mine.session
        return session

    def _run(self, timestep: float, inputs: Inputs) -> torch.Tensor:
        """The body's output, from a worker or from a step before."""
        session = self.session
        output: torch.Tensor = self._threads.reuse.output(timestep, inputs, session.step)
        return output

    # --- what is refused by name ---------------------------------------------------------------------------

    def load_lora_adapter(self, weights: Any, prefix: str | None = "transformer", **options: Any) -> Any:
        """Like diffusers'. Raises UnsupportedFeature for weights of blocks that are on the worker."""
        if not isinstance(weights, dict):
            raise UnsupportedFeature("load a LoRA by the pipeline's load_lora_weights, or pass its state dict")
        start = f"{prefix}." if prefix is not None else ""
        for name in weights:
            if name.startswith(start) and self._plan.in_body(name.removeprefix(start), self.split):
                raise UnsupportedFeature(
                    f"the LoRA has weights of {name}, which is on the worker: fuse it into the checkpoint that "
                    "device and workers load (fuse_lora, unload_lora_weights, save_pretrained)"
                )
        return super().load_lora_adapter(weights, prefix=prefix, **options)  # type: ignore[misc]

    def add_adapter(self, *_args: Any, **_options: Any) -> None:
        """Refused: training through the split."""
        raise UnsupportedFeature("adapters cannot be trained through the split")

    def save_pretrained(self, *_args: Any, **_options: Any) -> None:
        """Refused: this process holds a part of the model only."""
        raise UnsupportedFeature("a split model holds only its own blocks; save the original checkpoint")


def arguments(signature: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What a denoiser is called with, by name. Raises UnsupportedFeature for what the original does not know."""
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise UnsupportedFeature(f"the denoiser cannot be called so: {error}") from None

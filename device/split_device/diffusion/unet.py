"""`SplitUNet2DConditionModel`: a diffusion model's UNet whose lower levels run on a worker."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from split_common import wire
from split_common.checkpoint import Checkpoint
from split_common.diffusion.unet import UNetPlan, build_unet, load_weights, plan_unet
from split_common.errors import ConfigError, UnsupportedFeature
from split_common.fleet import load_fleet
from split_common.manifest import find_manifest
from split_common.split import Split
from split_common.tensors import dtype_name, parse_dtype
from split_common.transport import DEFAULT_BROKER, connect
from split_device.client import PATIENCE, STEP_TIMEOUT, Client
from split_device.diffusion.reuse import Reuse
from split_device.diffusion.session import ImageSession, Inputs
from split_device.diffusion.slots import Call, DownSlot, LastSlot, MiddleSlot, UpSlot
from split_device.timings import Timings

#: Codecs of the states on the way, by the names that users give them; "none" sends them as they are.
CODECS: dict[str, wire.Codec | None] = {"none": None, "fp16": "float16", "int8": "int8", "int4": "int4"}

_SIGNATURE = inspect.signature(UNet2DConditionModel.forward)


class SplitUNet2DConditionModel(UNet2DConditionModel):  # type: ignore[misc]
    """A UNet of diffusers with its body on a worker, for `unet=` of a pipeline. Made by `from_pretrained`.

    Text encoders, scheduler, noise, VAE, and the UNet's first and last blocks are the device's. Close it (or use it
    as a context manager) to leave the queue.
    """

    _client: Client
    _closed: Any

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        broker: str = DEFAULT_BROKER,
        cut: str = "C",
        codec: str = "none",
        reuse: int = 1,
        dtype: str | torch.dtype = "auto",
        keys: str | Path | None = None,
        member: str | None = None,
        timeout: float = 10.0,
        patience: float = PATIENCE,
        step_timeout: float = STEP_TIMEOUT,
    ) -> SplitUNet2DConditionModel:
        """Loads the device's blocks, and joins the queue.

        Args:
            path: the directory of a pipeline, or of its UNet, in safetensors format.
            broker: the queue, as for `SplitModelForCausalLM`.
            cut: "C" leaves the device the first level's blocks, "A" the first two levels'.
            codec: how states travel: "none" (as they are), "fp16", "int8" or "int4" (with channels' scales).
            reuse: call the worker at every step of this number only, and reuse its output between; 1 is exact.
            dtype: of parameters and states: "auto" (the checkpoint's), "float32", "bfloat16", "float16".
            keys, member, timeout, patience, step_timeout: as for `SplitModelForCausalLM`.

        Raises:
            UnknownModel, UnsupportedArchitecture, InvalidSplit, MissingTensor, TensorMismatch: of the model.
            KeysError, ConfigError: of the fleet or an argument.
            BrokerUnreachable: the broker did not answer in time.
        """
        if codec not in CODECS:
            raise ConfigError(f"{codec!r} is no codec: take {', '.join(CODECS)}")
        if reuse < 1:
            raise ConfigError(f"reuse={reuse}: it is at least 1")
        fleet = load_fleet(Path(keys) if keys is not None else None)
        identity = fleet.identity("device", member)
        transport = connect(broker, fleet, identity)
        plan = plan_unet(Checkpoint.resolve(path))
        split = plan.split(cut)
        manifest = find_manifest(fleet, plan.checkpoint, plan.own_tensors(split, "device"))
        unet: SplitUNet2DConditionModel = build_unet(plan, cls)
        unet._cut(plan, split)
        load_weights(unet, plan, split, "device", parse_dtype(dtype))
        service = wire.Service(manifest.root, split.first, split.last)
        client = Client(
            transport,
            fleet,
            identity,
            service,
            manifest.name,
            dtype_name(unet.dtype),
            timeout,
            patience,
            step_timeout=step_timeout,
        )
        client.start()
        unet._join(client, CODECS[codec], reuse)
        return unet

    def _cut(self, plan: UNetPlan, split: Split) -> None:
        """Puts slots in the place of the body's blocks."""
        self.split = split
        self._plan = plan
        self._call = Call()
        levels = plan.levels
        for level in range(split.first, levels):
            self.down_blocks[level] = DownSlot(self._call, plan.skips(level), level == split.first)
        blocks: Any = self
        if blocks.mid_block is not None:
            blocks.mid_block = MiddleSlot(self._call)
        last = levels - split.first - 1
        for index in range(last + 1):
            skips = len(self.up_blocks[index].resnets)
            if index < last:
                self.up_blocks[index] = UpSlot(self._call, skips)
            else:
                self.up_blocks[index] = LastSlot(self._call, skips, self._run, self.up_blocks[index].upsamplers)

    def _join(self, client: Client, codec: wire.Codec | None, reuse: int) -> None:
        self._client = client
        self._codec = codec
        self._every = reuse
        # A session belongs to one thread.
        self._threads = threading.local()
        self._closed = weakref.finalize(self, client.close)

    @property
    def timings(self) -> Timings:
        """Where the time of this model's steps went."""
        return self._client.timings

    @property
    def traffic(self) -> Counter[str]:
        """Messages and bytes sent and received, and messages refused by type of error, since the start."""
        transport: Any = self._client.transport
        counters: Counter[str] = transport.counters + self._client.counters
        return counters

    def close(self) -> None:
        """Leaves the queue; workers free this device's sessions. The model cannot be used afterwards."""
        self._closed()

    def __enter__(self) -> SplitUNet2DConditionModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- a step --------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Like diffusers'. Raises UnsupportedFeature, before anything is sent, for what cannot be split."""
        given = _SIGNATURE.bind(self, *args, **kwargs).arguments
        if given["sample"].requires_grad:
            raise UnsupportedFeature("gradients do not pass through the worker: use torch.no_grad()")
        if given.get("down_intrablock_additional_residuals") is not None:
            raise UnsupportedFeature("a T2I-Adapter cannot be split: it concerns blocks that are on the worker")
        self._call.timestep = float(torch.as_tensor(given["timestep"]).max())
        self._call.residuals = self._residuals(
            given["sample"],
            given.get("down_block_additional_residuals"),
            given.get("mid_block_additional_residual"),
        )
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._call.sample = self._call.embedding = self._call.context = None
            self._call.residuals = ()

    def _residuals(self, sample: torch.Tensor, down: Any, middle: Any) -> list[torch.Tensor]:
        """A ControlNet's residuals for the body. Raises UnsupportedFeature when they do not fit the UNet."""
        if down is None and middle is None:
            return []
        if down is None or middle is None:
            raise UnsupportedFeature("residuals of a ControlNet come for all blocks, or it is none")
        height, width = sample.shape[2:]
        own = 1
        for level in range(self.split.first):
            height, width = (height + 1) // 2, (width + 1) // 2
            own += self._plan.skips(level)
        residuals = [*down[own - 1 :], middle]
        wanted = [(len(sample), *shape) for shape in self._plan.skip_shapes(self.split, height, width)]
        if (found := [tuple(residual.shape) for residual in residuals]) != wanted:
            raise UnsupportedFeature(f"the ControlNet is of another size: residuals {found}, not {wanted}")
        return residuals

    def _run(self, inputs: Inputs) -> torch.Tensor:
        """The body's output, from a worker or from a step before."""
        session = self.session
        output: torch.Tensor = self._threads.reuse.output(self._call.timestep, inputs, session.step)
        return output

    @property
    def session(self) -> ImageSession:
        """The session of this thread; another one may `abandon` it."""
        mine = self._threads
        if not hasattr(mine, "session"):
            mine.session = ImageSession(self._client, self._plan, self.split, self._codec)
            mine.reuse = Reuse(self._every)
        session: ImageSession = mine.session
        return session

    # --- what is refused by name ---------------------------------------------------------------------------

    def load_lora_adapter(self, weights: Any, prefix: str | None = "unet", **options: Any) -> Any:
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
        return super().load_lora_adapter(weights, prefix=prefix, **options)

    def add_adapter(self, *_args: Any, **_options: Any) -> None:
        """Refused: training through the split."""
        raise UnsupportedFeature("adapters cannot be trained through the split")

    def load_attn_procs(self, *_args: Any, **_options: Any) -> None:
        """Refused: attention processors with weights belong to the worker's blocks as well."""
        raise UnsupportedFeature("attention processors with weights cannot be split: most are on the worker")

    def _load_ip_adapter_weights(self, *_args: Any, **_options: Any) -> None:
        raise UnsupportedFeature("an IP-Adapter cannot be split: most of its weights belong to the worker's blocks")

    def enable_freeu(self, *_args: Any, **_options: Any) -> None:
        """Refused: it changes blocks that are on the worker."""
        raise UnsupportedFeature("FreeU cannot be split: it changes blocks that are on the worker")

    def save_pretrained(self, *_args: Any, **_options: Any) -> None:
        """Refused: this process holds a part of the model only."""
        raise UnsupportedFeature("a split model holds only its own blocks; save the original checkpoint")

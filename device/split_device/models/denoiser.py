"""Common base of all split denoisers: loading the device's blocks, and calling the body."""

from __future__ import annotations

import inspect
import shlex
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
)

from split_common.errors import UnsupportedArchitecture, UnsupportedFeature
from split_common.models.checkpoint import Checkpoint
from split_common.models.codecs import EXACT
from split_common.models.denoisers.registry import read_denoiser_spec
from split_common.models.denoisers.spec import DenoiserSpec, load_weights
from split_common.models.split import Split
from split_common.models.tensors import dtype_name, parse_dtype
from split_common.models.verification import find_manifest
from split_common.protocol import payloads
from split_device.models.compression import CODECS, check_reuse, known_codec
from split_device.models.connected import ConnectedModel, Endpoint
from split_device.models.reuse import Base, Reuse
from split_device.models.stand_ins import Allows, OnWorker
from split_device.sessions.connection import Connection
from split_device.sessions.images import DenoiserInputs, ImageSession
from split_device.sessions.notices import OnNotice


class _PerThread(threading.local):
    """State of each thread that makes images. A session belongs to one thread."""

    session: ImageSession | None = None
    reuse: Reuse | None = None


class _OwnWeights(OrderedDict[str, torch.Tensor]):
    """A model's weights by name. `check` raises for a name that is missing because its weight is on the worker."""

    def __init__(self, check: Callable[[str], None]) -> None:
        super().__init__()
        self._check = check
        #: Versions of modules, which torch adds.
        self._metadata: OrderedDict[str, Any] = OrderedDict()

    def __missing__(self, name: str) -> torch.Tensor:
        self._check(name)
        raise KeyError(name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are plain dictionaries."""
        return OrderedDict, (list(self.items()),)


class SplitDenoiser(ConnectedModel):
    """A denoiser of diffusers with its body on a worker. Subclasses derive from the original class as well.

    The device runs text encoders, scheduler, noise, VAE, and the denoiser's first and last blocks.
    """

    _spec: DenoiserSpec
    #: The inputs to which the body adds its output; None if it does not.
    _base: Base | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        connection: Connection | None = None,
        cut: str = "C",
        codec: str = EXACT,
        reuse: float = 1,
        ip_adapter: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        **fields: Any,
    ) -> Self:
        """Loads the device's blocks, and joins the queue.

        Args:
            path: the directory of a pipeline, or of its denoiser, in safetensors format.
            connection: how the workers are reached, and how long to wait for them.
            cut: "C" leaves the device the blocks of a UNet's first level, or a transformer's first and last block;
                "A" those of the first two levels, or a sixth of the blocks at each end.
            codec: how the states travel: "exact" (as they are), "fp16", "int8" or "int4" (with a scale for each
                channel of a UNet, or each token of a transformer).
            reuse: from 1, call the worker at every `reuse`-th step. Below 1, call it when the body's input has
                changed by more than this fraction since the last call. Other steps reuse its output. 1 is exact.
            ip_adapter: the safetensors file of the IP-Adapter that the pipeline will load (`load_ip_adapter`).
                Workers must serve the model with the same one.
            dtype: of parameters and states: "auto" (the checkpoint's), "float32", "bfloat16", "float16".
            fields: instead of the connection's: `broker`, `keys`, `member`, `timeout`, `patience`, `step_timeout`
                and `on_notice` (see `Connection`).

        Raises:
            UnknownModel, UnsupportedArchitecture, InvalidSplit, MissingTensor, TensorMismatch: the model cannot be
                loaded or split like this.
            KeysError: the fleet's keys are missing or invalid.
            ConfigError: an argument is invalid.
            BrokerUnreachable: the broker did not answer in time.
        """
        encoding = CODECS[known_codec(codec, CODECS)]
        check_reuse(reuse)
        connection = Connection.of(connection, fields, unused=["history_memory", "pad_steps"])
        device = Endpoint.find(connection)
        spec = read_denoiser_spec(Checkpoint.resolve(path, ip_adapter=ip_adapter))
        if not issubclass(cls, getattr(diffusers, spec.class_name)):
            raise UnsupportedArchitecture(f"{spec.checkpoint.name} is a {spec.class_name}")
        split = spec.split(cut)
        manifest = find_manifest(device.fleet, spec.checkpoint, spec.own_tensors(split, "device"))
        model = cls._load(spec, split, parse_dtype(dtype), _allows_processor(ip_adapter is not None))
        client = device.join(
            manifest,
            split,
            dtype_name(model.dtype),  # type: ignore[attr-defined]
            options=_worker_options(path, cut, ip_adapter),
            unit="blocks",
        )
        model._set_client(client, split)
        model._spec, model._codec, model._reuse = spec, encoding, reuse
        model._per_thread = _PerThread()
        return model

    @classmethod
    def _load(cls, spec: DenoiserSpec, split: Split, dtype: torch.dtype | None, allows: Allows) -> Self:
        """The first and the last blocks, with sealed placeholders between them; they have no client yet."""
        model: Self = spec.build(cls)
        model._cut(spec, split)
        load_weights(model, spec, split, "device", dtype)  # type: ignore[arg-type]
        for name, slot in model.named_modules():  # type: ignore[attr-defined]
            if isinstance(slot, OnWorker) and not slot.sealed:
                slot.seal(name, allows)
        return model

    def _cut(self, spec: DenoiserSpec, split: Split) -> None:
        """Replaces the body's blocks by placeholders."""
        raise NotImplementedError

    _codec: payloads.Codec | None
    _reuse: float
    _per_thread: _PerThread

    def pipeline_options(self) -> dict[str, Any]:
        """Arguments of a pipeline's `from_pretrained` that make this its denoiser."""
        dtype: torch.dtype = self.dtype  # type: ignore[attr-defined]
        return {self._spec.component: self, "dtype": dtype, "variant": self._spec.checkpoint.variant}

    @property
    def session(self) -> ImageSession:
        """The session of the calling thread. Any thread may `abandon` it."""
        return self._per_thread.session or self.begin()

    def begin(
        self, request_id: str | None = None, index: int = 0, on_notice: OnNotice | None = None
    ) -> ImageSession:
        """Begins a session for the next images of the calling thread, and returns it.

        Args:
            request_id: the id by which logs name it, 1 to 128 visible ASCII characters; None for a random one.
            index: which of the images of one request id it is, from 0.
            on_notice: takes what is said while a step waits for a worker, beside the client's notices.

        Raises:
            ConfigError: the request id is not one.
        """
        state = self._per_thread
        session = ImageSession(self._client, self._spec, self.split, self._codec, request_id, index, on_notice)
        state.session, state.reuse = session, Reuse(self._reuse, self._base)
        return session

    def _run(self, timestep: float, inputs: DenoiserInputs) -> torch.Tensor:
        """The body's output, from a worker or from an earlier step."""
        session = self.session
        assert self._per_thread.reuse is not None
        return self._per_thread.reuse.output(timestep, inputs, session.step)

    # --- what is refused by name ---------------------------------------------------------------------------

    def load_lora_adapter(self, weights: Any, prefix: str | None = "transformer", **options: Any) -> Any:
        """Works like diffusers'. Raises UnsupportedFeature for weights of blocks that are on the worker."""
        if not isinstance(weights, dict):
            raise UnsupportedFeature("load a LoRA by the pipeline's load_lora_weights, or pass its state dict")
        start = f"{prefix}." if prefix is not None else ""
        for name in weights:
            if name.startswith(start):
                self._check_here(name.removeprefix(start))
        return super().load_lora_adapter(weights, prefix=prefix, **options)  # type: ignore[misc]

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Works like torch's. Whoever asks it for a weight of a block that is on the worker is refused by name.

        diffusers does, for each weight of a LoRA, before it calls `load_lora_adapter`.
        """
        if args or "destination" in options:
            return super().state_dict(*args, **options)  # type: ignore[misc]
        return super().state_dict(destination=_OwnWeights(self._check_here), **options)  # type: ignore[misc]

    def _check_here(self, name: str) -> None:
        """Raises UnsupportedFeature if a weight, or an adapter's of it, is on the worker."""
        if self._spec.in_body(name, self.split):
            raise UnsupportedFeature(
                f"the LoRA has weights of {name}, which is on the worker: fuse it into the checkpoint that "
                "device and workers load (fuse_lora, unload_lora_weights, save_pretrained)"
            )

    def add_adapter(self, *_args: Any, **_options: Any) -> None:
        """Refused: training through the split."""
        raise UnsupportedFeature("adapters cannot be trained through the split")


def _worker_options(path: str | Path, cut: str, ip_adapter: str | Path | None) -> str:
    """The options of a worker that serves such a body, for the messages that name one."""
    adapter = f" --ip-adapter {shlex.quote(str(ip_adapter))}" if ip_adapter is not None else ""
    return f" --model {shlex.quote(str(path))} --cut {cut}{adapter}"


def _allows_processor(adapted: bool) -> Allows:
    """What may be set on blocks of the worker: processors of the kind that it has, and those of its IP-Adapter."""
    adapters = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0) if adapted else ()

    def allows(module: OnWorker, name: str, value: Any) -> bool:
        own = type(module.original_settings.get("processor"))
        same = (AttnProcessor, AttnProcessor2_0) if own is AttnProcessor2_0 else (own,)
        if name != "processor" or type(value) not in (*same, *adapters):
            return False
        # The worker has an adapter's weights.
        for parameter in value.parameters() if isinstance(value, torch.nn.Module) else ():
            parameter.data = parameter.data.new_empty(0)
        return True

    return allows


def arguments(signature: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """A denoiser's arguments by name. Raises UnsupportedFeature if the original class does not take them."""
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise UnsupportedFeature(f"the denoiser cannot be called with these arguments: {error}") from None

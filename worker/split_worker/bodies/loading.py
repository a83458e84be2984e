"""Loads the body that a worker serves, of a language or an image model, and checks it against the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from split_common.engine.adapter_probe import check_adapters
from split_common.engine.linear import pack_linears
from split_common.engine.lora import ChosenAdapter, add_adapter
from split_common.engine.runner import build_runner
from split_common.engine.tuning import UNMEASURED
from split_common.errors import ConfigError, ModelError
from split_common.models.adapters import VerifiedAdapter, parse_adapters, verified_adapters
from split_common.models.checkpoint import Checkpoint
from split_common.models.denoisers.registry import is_denoiser, read_denoiser_spec
from split_common.models.denoisers.spec import DenoiserSpec
from split_common.models.loading import ModelSpec, load_part, read_spec
from split_common.models.split import DEFAULT_CUT, DEFAULT_LAYERS, Split
from split_common.models.tensors import dtype_name, use_gpu
from split_common.models.verification import find_manifest
from split_common.protocol import headers
from split_common.trust.fleet import Fleet
from split_worker.bodies.base import AnyBody
from split_worker.bodies.denoiser import DenoiserBody
from split_worker.bodies.language import LanguageBody
from split_worker.bodies.spread import spread, weight_bytes

#: Share of the free memory that keys and values get by default. The rest is for forwards.
CPU_KV_SHARE = 0.5
CUDA_KV_SHARE = 0.85

#: Share of a GPU's free memory that weights may take.
WEIGHTS_SHARE = 0.9

#: Most bytes of main memory that keys and values get by default, because other processes need memory too.
MAX_CPU_KV_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class Serving:
    """A loaded body, the service that it is offered as, and the name of the model, which is only shown."""

    body: AnyBody
    service: headers.Service
    model: str


def load_body(
    model: str,
    fleet: Fleet,
    *,
    revision: str | None = None,
    layers: str | None = None,
    cut: str | None = None,
    ip_adapter: str | Path | None = None,
    adapters: Sequence[str] = (),
    device: torch.device | Sequence[torch.device],
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    max_pixels: int | None = None,
    tune: bool = True,
    images: bool = False,
) -> Serving:
    """Loads the body of a language model or of a diffusion model's denoiser.

    Args:
        model: a directory, GGUF file or hub id.
        fleet: one of its manifests must match the tensors.
        revision: of a hub id.
        layers: the body's layers, or a denoiser's blocks, as `FIRST:LAST`; None for the default.
        cut: the name of a denoiser's cut, instead of `layers`.
        ip_adapter: the safetensors file of an IP-Adapter for a UNet.
        adapters: directories of LoRA adapters for a language model, as `NAME=DIR` or `DIR`.
        device: where the body runs; a language model's may be laid over several.
        dtype: what it computes in; None takes the checkpoint's.
        memory: bytes for keys and values, or for embeddings; None for the default.
        max_pixels: most pixels of an image; None for the default.
        tune: whether to measure what is fastest for a language model on this CPU.
        images: whether it was named as a diffusion model.

    Raises:
        ConfigError: options do not fit the model or each other.
        InvalidSplit: the model cannot be cut like this.
        UnsupportedFeature: an adapter does not run split.
        ModelError: it cannot be loaded, or does not fit into memory.
        KeysError: the fleet has no manifest of it.
        TensorMismatch: the manifest names other tensors.
    """
    checkpoint = Checkpoint.resolve(model, revision, ip_adapter)
    body: AnyBody
    if is_denoiser(checkpoint):
        if adapters:
            raise ConfigError(f"--adapter is for language models, which {model} is not")
        denoiser = read_denoiser_spec(checkpoint)
        split = _denoiser_split(denoiser, layers, cut)
        manifest = find_manifest(fleet, checkpoint, denoiser.own_tensors(split, "worker"))
        body = DenoiserBody(denoiser, split, _only(device), dtype, memory, max_pixels)
    else:
        named = {"--cut": cut, "--ip-adapter": ip_adapter, "--max-pixels": max_pixels}
        _check_absent(model, {**named, "--image-model": images or None})
        spec = read_spec(checkpoint)
        split = Split.parse(spec.layers, layers or str(DEFAULT_LAYERS))
        manifest = find_manifest(fleet, spec.checkpoint, spec.own_tensors(split, "worker"))
        loras = verified_adapters(fleet, parse_adapters(adapters), manifest)
        body = load_language_body(spec, split, device, dtype, memory, loras, tune=tune)
    return Serving(body, headers.Service(manifest.root, split.first, split.last), manifest.name)


def _only(device: torch.device | Sequence[torch.device]) -> torch.device:
    """The device of an image model's body, which is made current. Raises ConfigError if several are named."""
    devices = [device] if isinstance(device, torch.device) else device
    if len(devices) > 1:
        raise ConfigError(
            f"--device {','.join(map(str, devices))}: the blocks of an image model run on one device: start a "
            "worker for each GPU"
        )
    use_gpu(devices[0])
    return devices[0]


def _denoiser_split(denoiser: DenoiserSpec, layers: str | None, cut: str | None) -> Split:
    """Which blocks of a denoiser are the body's. Raises ConfigError or InvalidSplit."""
    if layers is None:
        return denoiser.split(cut or DEFAULT_CUT)
    if cut is not None:
        raise ConfigError("--layers and --cut say the same thing: give one of them")
    return denoiser.check(Split.parse(denoiser.blocks, layers, "blocks"))


def _check_absent(model: str, options: dict[str, Any]) -> None:
    """Raises ConfigError for an option of image models that is given with another one."""
    for option, given in options.items():
        if given is not None:
            raise ConfigError(f"{option} is for diffusion models, which {model} is not")


def load_language_body(
    spec: ModelSpec,
    split: Split,
    device: torch.device | Sequence[torch.device],
    dtype: torch.dtype | None = None,
    kv_bytes: int | None = None,
    adapters: Sequence[VerifiedAdapter] = (),
    *,
    tune: bool = True,
) -> LanguageBody:
    """Loads the body of a language model.

    Args:
        spec: the model.
        split: which layers are the body's.
        device: where it runs; or several devices, of which each gets a range of the layers. A GPU without an index
            is the current one, and all of them if the weights do not fit on it.
        dtype: what it computes in; None takes the checkpoint's.
        kv_bytes: memory for keys and values, on all devices together; None takes a share of what is free on each.
        adapters: what sessions may choose.
        tune: whether to measure what is fastest on this CPU.

    Raises:
        ConfigError: the layers cannot be divided into as many ranges as there are devices.
        ModelError: the part cannot be loaded, or the memory for weights, or for keys and values, is too small.
        UnsupportedFeature: an adapter changes more than linear layers, or rows with adapters cannot share forwards.
    """
    model, stack = load_part(spec, split, "worker", dtype=dtype)
    for number, lora in enumerate(adapters):
        add_adapter(model, stack, split, "worker", lora.adapter, number, ChosenAdapter())
    parameter_bytes = weight_bytes(model)
    devices = [device] if isinstance(device, torch.device) else [*device]
    tuning, ranges = UNMEASURED, []
    on_cpu = devices[0].type == "cpu"
    if not on_cpu:
        devices = _gpus(parameter_bytes, devices)
        use_gpu(devices[0])
    if len(devices) > 1:
        # The CPU's memory is one: its ranges have no rooms of their own.
        rooms = [parameter_bytes if on_cpu else weights_room(each) for each in devices]
        ranges = spread(model, stack, split, spec.text_config, devices, rooms)
    elif not on_cpu:
        model.to(devices[0])
    if on_cpu:
        tuning = pack_linears(model, stack, measure=tune)
    places = {parameter.device for parameter in model.parameters()} or {*devices}
    free = {place: kv_share(place) for place in places}
    runner = build_runner(stack, split, spec.text_config, free if kv_bytes is None else kv_bytes, tuning)
    check_adapters(runner, len(adapters))
    quantization = _quantization(spec, split, runner.dtype)
    return LanguageBody(runner, parameter_bytes, quantization, [lora.request for lora in adapters], ranges)


def _quantization(spec: ModelSpec, split: Split, dtype: torch.dtype) -> str | None:
    """Says how a body's quantized weights are run; None if they are not quantized."""
    if spec.quantization is None:
        return None
    stored = spec.checkpoint.nbytes(spec.own_tensors(split, "worker"))
    return spec.quantization.weights(stored, dtype_name(dtype)).describe()


def _gpus(parameter_bytes: int, devices: Sequence[torch.device]) -> list[torch.device]:
    """The GPUs that a body goes on: those that are named, or all if one has been chosen that is too small.

    Raises:
        ModelError: one GPU is named, and too small; or it is chosen, and is the only one.
    """
    if len(devices) > 1:
        return [*devices]
    (device,) = devices
    if parameter_bytes <= (room := weights_room(device)):
        return [device]
    count = torch.cuda.device_count()
    if device.index is not None or count == 1:
        more = f", or several of the {count} GPUs (--device cuda:0,cuda:1)" if count > 1 else ""
        raise ModelError(
            f"{parameter_bytes:,} bytes of weights do not fit on a GPU with room for {room:,}: serve fewer layers "
            f"(--layers), or use --dtype bfloat16 or --device cpu{more}"
        )
    return [torch.device("cuda", index) for index in range(count)]


def weights_room(device: torch.device) -> int:
    """Most bytes of weights that a GPU takes."""
    return int(WEIGHTS_SHARE * torch.cuda.mem_get_info(device)[0])


def kv_share(device: torch.device) -> int:
    """Bytes that keys and values get by default on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * CUDA_KV_SHARE)
    return min(MAX_CPU_KV_BYTES, int(psutil.virtual_memory().available * CPU_KV_SHARE))

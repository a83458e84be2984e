"""Loads the body that a worker serves, of a language or an image model, and checks it against the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from split_common.compat.transformers import no_split_modules
from split_common.engine.adapter_probe import check_adapters
from split_common.engine.linear import pack_linears
from split_common.engine.lora import ChosenAdapter, adapter_bytes, add_adapter
from split_common.engine.runner import build_runner
from split_common.engine.tuning import UNMEASURED
from split_common.errors import ConfigError, ModelError
from split_common.models.adapters import VerifiedAdapter, parse_adapters, verified_adapters
from split_common.models.checkpoint import Checkpoint
from split_common.models.denoisers.registry import is_denoiser, read_denoiser_spec
from split_common.models.denoisers.spec import DenoiserSpec
from split_common.models.loading import ModelSpec, load_part, read_spec
from split_common.models.quantization import stored_bytes
from split_common.models.split import DEFAULT_CUT, DEFAULT_LAYERS, Split
from split_common.models.tensors import dtype_name
from split_common.models.verification import find_manifest
from split_common.protocol import headers
from split_common.trust.fleet import Fleet
from split_worker.bodies.base import AnyBody
from split_worker.bodies.denoiser import DenoiserBody
from split_worker.bodies.language import LanguageBody

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
    device: torch.device,
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
        device: where the body runs.
        dtype: what it computes in; None takes the checkpoint's.
        memory: bytes for keys and values, or for embeddings; None for the default.
        max_pixels: most pixels of an image; None for the default.
        tune: whether to measure what is fastest for a language model on this CPU.
        images: whether it was named as a diffusion model.

    Raises:
        ConfigError: options do not fit the model or each other.
        InvalidSplit: the model cannot be cut like this.
        UnsupportedFeature: an adapter cannot be split.
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
        body = DenoiserBody(denoiser, split, device, dtype, memory, max_pixels)
    else:
        named = {"--cut": cut, "--ip-adapter": ip_adapter, "--max-pixels": max_pixels}
        _check_absent(model, {**named, "--image-model": images or None})
        spec = read_spec(checkpoint)
        split = Split.parse(spec.layers, layers or str(DEFAULT_LAYERS))
        manifest = find_manifest(fleet, spec.checkpoint, spec.own_tensors(split, "worker"))
        loras = verified_adapters(fleet, parse_adapters(adapters), manifest)
        body = load_language_body(spec, split, device, dtype, memory, loras, tune=tune)
    return Serving(body, headers.Service(manifest.root, split.first, split.last), manifest.name)


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
    device: torch.device,
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
        device: where it runs.
        dtype: what it computes in; None takes the checkpoint's.
        kv_bytes: memory for keys and values; None takes a share of what is free.
        adapters: what sessions may choose.
        tune: whether to measure what is fastest on this CPU.

    Raises:
        ModelError: the part cannot be loaded, or the memory for keys and values is too small.
        UnsupportedFeature: an adapter changes more than linear layers, or rows with adapters cannot share forwards.
    """
    model, stack = load_part(spec, split, "worker", dtype=dtype)
    for number, lora in enumerate(adapters):
        add_adapter(model, stack, split, "worker", lora.adapter, number, ChosenAdapter())
    parameter_bytes = sum(map(stored_bytes, model.parameters())) + adapter_bytes(model)
    tuning = UNMEASURED
    if device.type == "cpu":
        tuning = pack_linears(model, stack, measure=tune)
    else:
        place_on_gpus(model, parameter_bytes, device)
    devices = {parameter.device for parameter in model.parameters()} or {device}
    free = len(devices) * min(kv_share(place) for place in devices)
    runner = build_runner(stack, split, spec.text_config, kv_bytes if kv_bytes is not None else free, tuning)
    check_adapters(runner, len(adapters))
    quantization = _quantization(spec, split, runner.dtype)
    return LanguageBody(runner, parameter_bytes, quantization, [lora.request for lora in adapters])


def _quantization(spec: ModelSpec, split: Split, dtype: torch.dtype) -> str | None:
    """Says how a body's quantized weights are run; None if they are not quantized."""
    if spec.quantization is None:
        return None
    stored = spec.checkpoint.nbytes(spec.own_tensors(split, "worker"))
    return spec.quantization.weights(stored, dtype_name(dtype)).describe()


def place_on_gpus(model: Any, parameter_bytes: int, device: torch.device) -> None:
    """Moves a body to a GPU, or spreads it over all GPUs by accelerate's device map if one is too small.

    Raises:
        ModelError: all GPUs together are too small.
    """
    if parameter_bytes < WEIGHTS_SHARE * torch.cuda.mem_get_info(device)[0]:
        model.to(device)
        return
    free = {index: torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())}
    allowed = {index: int(WEIGHTS_SHARE * bytes_) for index, bytes_ in free.items()}
    if parameter_bytes > sum(allowed.values()):
        raise ModelError(
            f"{parameter_bytes:,} bytes of weights do not fit on {len(free)} GPUs with {sum(free.values()):,} "
            "free: serve fewer layers (--layers), or use --dtype bfloat16 or --device cpu"
        )
    from accelerate import dispatch_model, infer_auto_device_map

    device_map = infer_auto_device_map(model, allowed, no_split_module_classes=no_split_modules(model))
    dispatch_model(model, device_map)


def kv_share(device: torch.device) -> int:
    """Bytes that keys and values get by default on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * CUDA_KV_SHARE)
    return min(MAX_CPU_KV_BYTES, int(psutil.virtual_memory().available * CPU_KV_SHARE))

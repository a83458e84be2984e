"""Checkpoints with quantized weights: what they run as, or why they are refused.

Weights that transformers can dequantize are dequantized while they are loaded, one tensor at a time: no kernel is
then needed that would be fetched from a hub, and activations are not rounded, which would make a token depend on
those that are computed with it. The others run as they are stored, by the package that made them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

import torch
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from split_common.compat.bitsandbytes import import_bitsandbytes
from split_common.errors import ModelError, UnsupportedArchitecture
from split_common.models.checkpoint import Checkpoint

#: Methods whose weights run as they are stored, because the package computes each token alike in every forward.
_AS_STORED: Final = ("awq", "bitsandbytes_4bit", "gptq", "torchao")

#: The module that each method of the extra `quantization` needs.
_MODULES: Final = {
    "bitsandbytes_4bit": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "torchao": "torchao",
}


@dataclass(frozen=True)
class QuantizedWeights:
    """Some quantized weights: the method, their bytes in the checkpoint, and what they are dequantized to.

    That is a dtype, or None if they run as they are stored.
    """

    method: str
    stored_bytes: int
    dequantized_to: str | None

    def describe(self) -> str:
        """One line for people."""
        to = self.dequantized_to
        run = f"are dequantized to {to}" if to is not None else "run as they are stored"
        return f"{self.stored_bytes:,} bytes of weights in {self.method} {run}"


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's quantized weights are run.

    Args:
        method: what `quantization_config` calls it, e.g. "mxfp4".
        dequantized: whether the weights are converted to the model's dtype while they are loaded.
    """

    method: str
    dequantized: bool

    def weights(self, stored_bytes: int, dtype: str) -> QuantizedWeights:
        """Some of the weights, of a model of a dtype."""
        return QuantizedWeights(self.method, stored_bytes, dtype if self.dequantized else None)


#: How the weights of GGUF files are run.
GGUF: Final = Quantization("GGUF", dequantized=True)


def prepare_quantization(config: Any, own_config: Any, name: str) -> Quantization | None:
    """Finds out how a model's quantized weights can be run, and has transformers dequantize those that it can.

    Args:
        config: the checkpoint's configuration, or its decoder's, has the `quantization_config`.
        own_config: what the model's class takes: the same, or a part of it. It gets the `quantization_config`.
        name: the model's, for messages.

    Returns:
        None if the configuration has no `quantization_config`.

    Raises:
        UnsupportedArchitecture: they cannot be run, or a package is missing.
    """
    settings = _settings(config)
    if settings is None:
        return None
    own_config.quantization_config = settings
    method = _method(settings)
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise UnsupportedArchitecture(
            f"{name} is quantized by {settings.get('quant_method')!r}, which transformers does not know"
        )
    if (module := _MODULES.get(method)) is not None and find_spec(module) is None:
        raise UnsupportedArchitecture(
            f"{name} is quantized by {module}, which is not installed: pip install 'lambda-split[quantization]'"
        )
    try:
        if module == "bitsandbytes":
            import_bitsandbytes()
        parsed = AutoQuantizationConfig.from_dict(dict(settings))
        dequantized = hasattr(parsed, "dequantize")
        if dequantized:
            settings["dequantize"] = parsed.dequantize = True
        elif method not in _AS_STORED:
            raise UnsupportedArchitecture(
                f"{name}: weights quantized by {method} do not run split: use the original weights, or those of "
                "another method (docs/support.md)"
            )
        AutoHfQuantizer.from_config(parsed, pre_quantized=True).validate_environment(
            device_map=None, weights_only=True
        )
    except (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedArchitecture(f"{name} is quantized ({method}): {str(error).strip() or error!r}") from None
    return Quantization(method, dequantized)


def _settings(config: Any) -> dict[str, Any] | None:
    """The `quantization_config` of a configuration or of its decoder's."""
    for place in (config, config.get_text_config(decoder=True)):
        if isinstance(settings := getattr(place, "quantization_config", None), dict):
            return settings
    return None


def _method(settings: dict[str, Any]) -> str:
    """The name of a quantizer in transformers, which has two for bitsandbytes."""
    for bits in (4, 8):
        if settings.get(f"load_in_{bits}bit"):
            return f"bitsandbytes_{bits}bit"
    return str(settings.get("quant_method"))


def assemble_torchao(checkpoint: Checkpoint, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Puts torchao's tensors together from their parts.

    Args:
        checkpoint: says which tensor is a part of which, and how they are put together.
        state: tensors of the checkpoint, by name.

    Returns:
        The tensors that have no parts, and the assembled ones, by name.

    Raises:
        ModelError: a description is not one of torchao's, or does not fit the parts.
        UnsupportedArchitecture: a tensor's activations would be rounded, too.
    """
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    parts: dict[str, dict[str, torch.Tensor]] = {}
    assembled = {}
    for name, tensor in state.items():
        if whole := checkpoint.entry(name).whole:
            parts.setdefault(whole, {})[name] = tensor
        else:
            assembled[name] = tensor
    for whole, tensors in parts.items():
        description = checkpoint.entry(next(iter(tensors))).description
        metadata = {"tensor_names": json.dumps([whole]), whole: description}
        try:
            found, _ = unflatten_tensor_state_dict(tensors, metadata)
        except Exception as error:
            raise ModelError(f"{checkpoint.name}: {whole} cannot be put together: {error!r}") from None
        if getattr(found.get(whole), "act_quant_kwargs", None) is not None:
            raise UnsupportedArchitecture(
                f"{checkpoint.name}: torchao would round the inputs of {whole}, so that a token would depend on "
                "those that are computed with it: quantize the weights alone"
            )
        assembled |= found
    return assembled


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of those that a quantized one consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)

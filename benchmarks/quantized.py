"""Rewrites a small checkpoint in the forms in which quantized models are published.

Each form takes a checkpoint that transformers saved in float, and writes the tensors, names and
`quantization_config` that the form's own tools write. Widths have to be multiples of 32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

#: Rows and columns that share a scale in FP8. Published models have 128.
FP8_BLOCK: Final = 16
#: Elements that share a scale in MXFP4, and in the other forms with groups.
GROUP: Final = 32
#: The largest number of FP8 (E4M3).
_FP8_MAX: Final = 448.0
#: The positive numbers of FP4 (E2M1), by their three bits.
_FP4: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_Tensors = dict[str, torch.Tensor]


def quantize(form: str, source: Path, target: Path) -> Path:
    """Writes a checkpoint in a quantized form.

    Args:
        form: a key of `FORMS`.
        source: directory with one safetensors file in float, and its configuration.
        target: the directory to write.

    Returns:
        What `--model` takes: the directory, or the GGUF file in it.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        shutil.copy(file, target)
    return FORMS[form](source, target)


def _rewrite(
    source: Path, target: Path, config: dict[str, Any], change: Callable[[str, torch.Tensor], _Tensors]
) -> Path:
    """Replaces each tensor by what `change` makes of it, and adds a `quantization_config`."""
    tensors: _Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        tensors |= {new: value.contiguous() for new, value in change(name, tensor).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return target


def _is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Whether forms that keep embeddings, routers and the head in float quantize a tensor."""
    kept = ("embed", "lm_head", "norm", ".gate.", "router")
    return name.endswith(".weight") and tensor.ndim == 2 and not any(part in name for part in kept)


def _mxfp4(source: Path, target: Path) -> Path:
    """As OpenAI publishes gpt-oss: experts in blocks of 32 FP4 numbers with an exponent each."""

    def change(name: str, tensor: torch.Tensor) -> _Tensors:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        groups = tensor.float().transpose(1, 2).unflatten(-1, (-1, GROUP))
        exponent = (groups.abs().amax(-1, keepdim=True) / _FP4[-1]).clamp_min(2.0**-20).log2().ceil()
        scaled = groups / exponent.exp2()
        codes = (scaled.abs().unsqueeze(-1) - torch.tensor(_FP4)).abs().argmin(-1) + 8 * (scaled < 0)
        blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": (exponent.squeeze(-1) + 127).to(torch.uint8)}

    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _rewrite(source, target, {"quant_method": "mxfp4", "modules_to_not_convert": kept}, change)


def _fp8(source: Path, target: Path) -> Path:
    """As DeepSeek publishes V3: linear layers in E4M3 with a scale for each square block."""

    def change(name: str, tensor: torch.Tensor) -> _Tensors:
        if not _is_linear(name, tensor):
            return {name: tensor}
        rows, columns = (FP8_BLOCK if size % FP8_BLOCK == 0 else size for size in tensor.shape)
        blocks = tensor.float().unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        scale = blocks.abs().amax((1, 3)).clamp_min(1e-12) / _FP8_MAX
        packed = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
        return {name: packed, f"{name}_scale_inv": scale}

    size = [FP8_BLOCK, FP8_BLOCK]
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": size}
    return _rewrite(source, target, config, change)


def _compressed(
    weights: dict[str, Any], activations: dict[str, Any] | None, form: str
) -> Callable[[Path, Path], Path]:
    """As llm-compressor writes a scheme."""

    def write(source: Path, target: Path) -> Path:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": form}
        scheme = QuantizationScheme.model_validate(group)
        compressor = BaseCompressor.get_value_from_registry(form)

        def change(name: str, tensor: torch.Tensor) -> _Tensors:
            if not _is_linear(name, tensor):
                return {name: tensor}
            groups = tensor.float().unflatten(1, (-1, weights.get("group_size") or tensor.shape[1]))
            largest = _FP8_MAX if weights["type"] == "float" else 2.0 ** (weights["num_bits"] - 1) - 0.5
            scale = groups.abs().amax(-1) / largest
            parts = compressor.compress({"weight": tensor.float(), "weight_scale": scale}, scheme)
            return {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}

        config = {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
        return _rewrite(source, target, config, change)

    return write


def _by_transformers(settings: Callable[[], Any]) -> Callable[[Path, Path], Path]:
    """Quantized while loading, and saved again."""

    def write(source: Path, target: Path) -> Path:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings())
        model.save_pretrained(target)
        return target

    return write


def _nf4() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def _int8() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_rounding() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())


#: llama.cpp's names of a decoder's tensors.
_GGUF_NAMES: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf(source: Path, target: Path) -> Path:
    """As llama.cpp converts a Llama: one file in Q8_0."""
    import gguf

    config = json.loads((source / "config.json").read_text())
    file = target / "model-Q8_0.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads := config["num_attention_heads"])
    writer.add_head_count_kv(pairs := config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(10000.0)
    for name, tensor in load_file(source / "model.safetensors").items():
        prefix, _, inner = name.removesuffix(".weight").removeprefix("model.layers.").partition(".")
        known = f"blk.{prefix}.{_GGUF_NAMES[inner]}" if name.startswith("model.layers.") else None
        new = known or _GGUF_NAMES[name.removesuffix(".weight")]
        if new.endswith((".attn_q", ".attn_k")):
            # llama.cpp rotates neighbours, transformers the two halves of a head.
            count = heads if new.endswith("_q") else pairs
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        values = tensor.float().contiguous().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{new}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for other in target.glob("*.json"):
        other.unlink()
    return file


_INT4: Final = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
_INT8: Final = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_FLOAT8: Final = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}

#: Writes each form from a float checkpoint, given the directories of both.
FORMS: Final[dict[str, Callable[[Path, Path], Path]]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "w4a16": _compressed(_INT4, None, "pack-quantized"),
    "w8a8": _compressed(_INT8, _INT8 | {"strategy": "token", "dynamic": True}, "int-quantized"),
    "w8a8_fp8": _compressed(_FLOAT8, _FLOAT8 | {"strategy": "token", "dynamic": True}, "float-quantized"),
    "bnb_nf4": _by_transformers(_nf4),
    "bnb_int8": _by_transformers(_int8),
    "torchao_int8": _by_transformers(_torchao),
    "torchao_int8_rounding": _by_transformers(_torchao_rounding),
    "gguf": _gguf,
}

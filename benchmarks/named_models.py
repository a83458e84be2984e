"""The 24 structures of language models that `benchmarks.models` runs, tiny and random, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import quantized, structures

#: Quantized forms that transformers computes with, rather than with the weights that they stand for.
RUN_AS_STORED = ("bnb_nf4", "torchao_int8")


@dataclass(frozen=True)
class NamedModel:
    """A structure in the form in which its makers publish it."""

    #: The type that transformers calls it.
    model_type: str
    #: Whether the published checkpoints are of the class that sees images.
    images: bool = False
    #: Whether transformers runs texts by another class than that of the checkpoints, whose own forward fails.
    text_class: bool = False
    #: The quantized form, one of `quantized.FORMS`.
    form: str | None = None
    #: Values of the configuration that differ from the usual small ones.
    changes: Mapping[str, Any] = field(default_factory=dict)

    def save(self, directory: Path) -> Path:
        """Writes a checkpoint into a directory; returns what `--model` takes."""
        model = structures.save(self.model_type, directory / self.model_type, self.images, **self.changes)
        return model if self.form is None else quantized.quantize(self.form, model, directory / self.form)

    def unsplit(self, model: Path) -> Any:
        """The model of a saved checkpoint in one process, in float32, and dequantized where the product does so."""
        causal = transformers.AutoModelForCausalLM
        if self.form == "gguf":
            return causal.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32).eval()
        config = transformers.AutoConfig.from_pretrained(model)
        if self.form is not None and self.form not in RUN_AS_STORED:
            config.quantization_config["dequantize"] = True
        model_class = causal if self.text_class else getattr(transformers, config.architectures[0])
        return model_class.from_pretrained(model, config=config, dtype=torch.float32).eval()


#: Widths that quantized forms divide.
_WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}

#: As in 12B and larger: the E kind has inputs of its own for each layer.
_GEMMA4 = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True}

MODELS: dict[str, NamedModel] = {
    "qwen3_5": NamedModel("qwen3_5", images=True),
    "qwen3_5_moe": NamedModel("qwen3_5_moe", images=True),
    "qwen3_next": NamedModel("qwen3_next"),
    "qwen3_vl": NamedModel("qwen3_vl", images=True),
    "gemma3": NamedModel("gemma3", images=True),
    "gemma4": NamedModel("gemma4", images=True, changes={"text_config": _GEMMA4}),
    "gpt_oss_mxfp4": NamedModel("gpt_oss", form="mxfp4", changes={"intermediate_size": 64}),
    "deepseek_v3_fp8": NamedModel("deepseek_v3", form="fp8"),
    "deepseek_v32": NamedModel("deepseek_v32"),
    "deepseek_v4": NamedModel("deepseek_v4"),
    "glm4_moe": NamedModel("glm4_moe"),
    "glm_moe_dsa": NamedModel("glm_moe_dsa", changes={"indexer_types": ["full", "shared"] * 4}),
    "kimi_linear": NamedModel("kimi_linear"),
    "minimax_m2_fp8": NamedModel("minimax_m2", form="fp8"),
    "nemotron_h": NamedModel("nemotron_h"),
    "granitemoehybrid": NamedModel("granitemoehybrid"),
    "lfm2": NamedModel("lfm2", changes={"layer_types": ["conv", "conv", "full_attention", "conv"] * 2}),
    "llama4": NamedModel("llama4", images=True, text_class=True),
    "mistral3": NamedModel("mistral3", images=True),
    "olmo_hybrid": NamedModel("olmo_hybrid"),
    "llama_compressed_tensors": NamedModel("llama", form="w4a16", changes=_WIDE),
    "llama_bnb_nf4": NamedModel("llama", form="bnb_nf4", changes=_WIDE),
    "llama_torchao_int8": NamedModel("llama", form="torchao_int8", changes=_WIDE),
    "llama_gguf": NamedModel("llama", form="gguf", changes=_WIDE),
}

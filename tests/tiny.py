"""Tiny random models of many architectures: six layers, hidden size 32, fast enough for every unit test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LAYERS = 6
VOCABULARY = 97

# Attributes under the names that most architectures share; GPT-2's kind has names of its own.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 256, "n_inner": 48}
_WINDOW = {"sliding_window": 8}
_HEAD_DIM = {"head_dim": 8}
_GEMMA = {**_HEAD_DIM, **_WINDOW, "query_pre_attn_scalar": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# What each architecture adds to _COMMON. `model_type` where the name here is a variant's.
_LISTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": _WINDOW,
    "qwen2": {},
    "qwen2_sw": {"model_type": "qwen2", "use_sliding_window": True, **_WINDOW, "max_window_layers": 3},
    "qwen3": _HEAD_DIM,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _WINDOW,
    "gpt2": _GPT2,
    "gpt2_inv": {"model_type": "gpt2", **_GPT2, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {},
    "mixtral": {**_WINDOW, **_LOCAL_EXPERTS},
    "qwen3_moe": {**_HEAD_DIM, **_EXPERTS, "decoder_sparse_step": 2, "mlp_only_layers": [5]},
}
_UNLISTED: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "gpt_oss": {**_HEAD_DIM, **_WINDOW, **_LOCAL_EXPERTS},
    "cohere2": _WINDOW,
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 3,
        "rope_interleave": True,
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "bloom": {"n_layer": LAYERS, "n_head": 4},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "phi": {},
    "stablelm": {},
    "granite": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 2},
}

#: Architectures that the product names as tested, and others that it has no line about.
LISTED = tuple(_LISTED)
UNLISTED = tuple(_UNLISTED)


def build(arch: str, **changes: Any) -> PreTrainedModel:
    """Make the model of `arch`, its configuration changed: on the CPU, in fp32 and evaluation mode, the same weights every time."""
    options = {**_COMMON, "model_type": arch, **{**_LISTED, **_UNLISTED}[arch], **changes}
    config = AutoConfig.for_model(**options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Larger than a fresh model's weights, so that neither the layers nor the logits are near to zero.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.25)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval()


def save(arch: str, directory: Path, max_shard_size: int | str | None = None, **changes: Any) -> Path:
    """Save the model of `arch` as a checkpoint in `directory`, in shards of at most `max_shard_size`."""
    build(arch, **changes).save_pretrained(directory, max_shard_size=max_shard_size or "1GB")
    return directory

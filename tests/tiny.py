"""Tiny random models of many architectures: six layers, hidden size 32, fast enough for every unit test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

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

#: Rotary frequencies that depend on the largest position: others from 16 on.
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 16,
}

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

# Of a build that few share: a projection before the stack, windows that no cache knows of, no position ids, layers
# that view attention's output, norms without parameters, embeddings of positions that are counted by the cache.
_ODD: dict[str, dict[str, Any]] = {
    "opt_narrow": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "gpt_neo": {
        "num_layers": LAYERS,
        "attention_types": [[["global", "local"], 3]],
        "window_size": 8,
        "num_heads": 4,
    },
    "ctrl": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 256, "dff": 48},
    "afmoe": {**_HEAD_DIM, **_WINDOW, **_EXPERTS, "num_dense_layers": 2},
    "olmo": {},
    "trocr": {"decoder_ffn_dim": 48},
}
# Whose padded rows are not what they are alone: the mask chooses keys, or the cache's index scales queries.
_UNPADDED: dict[str, dict[str, Any]] = {
    "doge": {"keep_window_size": 8},
    "llama4_text": {
        **_HEAD_DIM,
        **_LOCAL_EXPERTS,
        "attention_chunk_size": 8,
        "intermediate_size_mlp": 48,
        "no_rope_layer_interval": 2,
    },
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 24,
}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
}
#: Layers that keep states beside those that keep keys and values; in the middle, some layers of each kind.
_HYBRID: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_HEAD_DIM, **_EXPERTS, **_LINEAR},
    "qwen3_5_text": {**_HEAD_DIM, **_LINEAR, "head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 3, "block_auto_adjust_ff_dim": False},
    "granitemoehybrid": {
        **_MAMBA2,
        **_LOCAL_EXPERTS,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "mamba", "mamba", "attention", "mamba", "attention"],
    },
    "nemotron_h": {
        **_HEAD_DIM,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 4,
        "layers_block_type": ["mamba", "moe", "mamba", "attention", "moe", "mamba"],
        **_EXPERTS,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "moe_shared_expert_intermediate_size": 24,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 4},
}
_DSA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    # With few of them most keys score zero alike, and which are chosen depends on how many there are.
    "index_n_heads": 16,
    "index_topk": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
#: Layers that choose their keys by an indexer, and layers that use another layer's keys or its choice.
_LINKED: dict[str, dict[str, Any]] = {
    "deepseek_v32": _DSA,
    "glm_moe_dsa": {**_DSA, "indexer_types": ["full", "full", "full", "shared", "full", "shared"]},
    "gemma4_unified_text": {
        **_GEMMA,
        "global_head_dim": 8,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
}
_PER_LAYER = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
_REFUSED: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4, "decoder_start_token_id": 0},
    "recurrent_gemma": {"attention_window_size": 8, "lru_width": 32, "num_hidden_layers": LAYERS},
    "gemma3n_text": {
        **_GEMMA,
        **_PER_LAYER,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "intermediate_size": [48] * LAYERS,
    },
    "gemma4_text": {**_GEMMA, **_PER_LAYER, "global_head_dim": 8, "num_kv_shared_layers": 0},
    "bert": {"is_decoder": True},
    "openai-gpt": {**_GPT2, "hidden_size": 32},
    "moshi": {**_HEAD_DIM, **_WINDOW, "ffn_dim": 48},
}

#: Architectures that the product names as tested, and others that it has no line about.
LISTED = tuple(_LISTED)
UNLISTED = tuple(_UNLISTED)
ODD = tuple(_ODD)
HYBRID = tuple(_HYBRID)
#: Architectures of which layers choose their keys, or use those of others.
LINKED = tuple(_LINKED)
#: Architectures of which padded rows are refused.
UNPADDED = tuple(_UNPADDED)
#: Architectures that cannot be cut, or that keep something between steps that their cache does not have.
REFUSED = tuple(_REFUSED)


# For `mtp_checkpoints`. The tensors of its MTP layer, which has a window, have a name of their own.
_MTP = {
    "mellum": {
        **_HEAD_DIM,
        **_WINDOW,
        **_EXPERTS,
        "layer_types": ["full_attention", "sliding_attention"] * (LAYERS // 2) + ["sliding_attention"],
    },
}


_ALL = {**_LISTED, **_UNLISTED, **_ODD, **_HYBRID, **_LINKED, **_UNPADDED, **_REFUSED, **_MTP}


def build(arch: str, **changes: Any) -> PreTrainedModel:
    """Make the model of `arch`, its configuration changed: on the CPU, in fp32, the same weights every time."""
    options = {**_COMMON, "model_type": arch, **_ALL[arch], **changes}
    config = AutoConfig.for_model(**options)
    return randomized(AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM, config)


def randomized(auto_class: Any, config: Any) -> PreTrainedModel:
    """Make a model on the CPU, in fp32, with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32)
        # Larger than a fresh model's weights, so that neither the layers nor the logits are near to zero.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.25)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval()


def saved_once(factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that saves the model of an architecture when it is first asked for it, and returns where."""
    saved: dict[str, Path] = {}

    def find(arch: str) -> Path:
        if arch not in saved:
            saved[arch] = save(arch, factory.mktemp(arch))
        return saved[arch]

    return find


def save(arch: str, directory: Path, max_shard_size: int | str | None = None, **changes: Any) -> Path:
    """Save the model of `arch` as a checkpoint in `directory`, in shards of at most `max_shard_size`."""
    build(arch, **changes).save_pretrained(directory, max_shard_size=max_shard_size or "1GB")
    return directory


#: One token for each character; a message is `ROLE:TEXT</s>`.
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


#: Characters that end lines for some readers, that terminals obey, that take two to four bytes, or two code units.
ODD_CHARACTERS = "\x07\x0b\x0c\x1b\x1e\x7f\x85\x9b\u2028\u2029é你🦄"


def save_tokenizer(directory: Path, more: str = "") -> Path:
    """Save a tokenizer of characters, with a chat template, beside the model in `directory`.

    `more` replaces the last of its characters.
    """
    usual = ["\n", *(chr(code) for code in range(32, 127) if chr(code) not in "`|~")]
    characters = [*usual[: len(usual) - len(more)], *more]
    vocabulary = {token: id_ for id_, token in enumerate([*_SPECIAL, *characters])}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, _SPECIAL, strict=True)))
    wrapped.chat_template = _TEMPLATE
    wrapped.save_pretrained(directory)
    return directory


def deviation(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference between two tensors of one shape, as a share of the largest value that was wanted."""
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())

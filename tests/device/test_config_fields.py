"""Fields of configurations that few checkpoints set: what one changes of a model, it changes of the split one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from benchmarks.structures import PROMPT, auto_class, save
from fleet import joined, running_broker

#: Values that differ from a type's own, and from those of the other tests' models: several of a type at once.
FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rms_norm_eps": 0.2, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
        },
    ),
    (
        "granitemoehybrid",
        {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5, "mamba_proj_bias": True},
    ),
    ("minicpm3", {"scale_depth": 0.4, "scale_emb": 3, "dim_model_base": 8}),
    ("cohere", {"logit_scale": 0.5, "use_qk_norm": True}),
    ("gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 3}),
    ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True}),
    ("falcon", {"alibi": True, "parallel_attn": False, "bias": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16, "enable_bias": False}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("mpt", {"logit_scale": 0.25}),
    ("smollm3", {"no_rope_layers": [1, 0, 0, 1, 0, 1, 1, 0]}),
    ("olmo", {"clip_qkv": 0.3}),
    ("deepseek_v3", {"routed_scaling_factor": 0.5, "norm_topk_prob": False, "rope_interleave": False}),
    ("gpt_oss", {"swiglu_alpha": 0.7, "swiglu_limit": 0.5}),
    ("afmoe", {"route_scale": 3.0, "mup_enabled": True}),
    ("lfm2", {"conv_bias": True, "norm_eps": 0.1}),
]

#: Largest difference of logits that counts as rounding, relative to the largest logit.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with running_broker() as running:
        yield running.address


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT)).logits
    return found.float()


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > TOLERANCE * one.abs().max())


@pytest.mark.parametrize(
    ("model_type", "fields"), FIELDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_field_changes_the_split_model_as_it_does_the_unsplit(
    model_type: str, fields: dict[str, Any], broker: str, tmp_path: Path
) -> None:
    plain = AutoConfig.for_model(model_type)
    checkpoint = save(model_type, tmp_path / model_type, **fields)
    load = auto_class(model_type).from_pretrained
    wanted = logits(load(checkpoint))
    for name, value in fields.items():
        if isinstance(value, float) and isinstance(usual := getattr(plain, name), float):
            without = AutoConfig.from_pretrained(checkpoint, **{name: usual})
            assert differs(wanted, logits(load(checkpoint, config=without))), f"{name} has no effect"
    with joined(broker, checkpoint) as (split, _):
        assert not differs(wanted, logits(split))
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        ids = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
        assert split.generate(**ids, **options).tolist() == load(checkpoint).generate(**ids, **options).tolist()

"""A small random Llama. It loads fast, so that a killed worker soon serves again."""

from __future__ import annotations

from pathlib import Path

#: Standard deviation of the weights: larger than a new model's, so that no two logits nearly tie.
DEVIATION = 0.25


def build(directory: Path, seed: int) -> Path:
    """Saves the model in `directory`. The same seed gives the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, DEVIATION, generator=generator)
    model.save_pretrained(directory)
    return directory

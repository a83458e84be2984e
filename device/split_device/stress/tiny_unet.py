"""A small random UNet in the shape of SDXL's."""

from __future__ import annotations

from pathlib import Path


def build(directory: Path, seed: int) -> Path:
    """Saves the UNet in `directory`. The same seed gives the same weights."""
    import torch
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 16,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
        "cross_attention_dim": 48,
        "norm_num_groups": 8,
    }
    # The global random state stays as it was.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**config)
    unet.save_pretrained(directory)
    return directory

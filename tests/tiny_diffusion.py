"""Tiny random pipelines of real diffusers classes, in the shapes of SDXL, SD 1.5, SD 3 and Flux: 64×64 pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TOKENS = 16
TEXT = 32
#: Width of an image's embedding.
IMAGE = 24


def frozen(pipeline: Any) -> Any:
    """A pipeline whose denoiser is frozen, as the parts of a split one are: a reference that is equal bit by bit.

    `torch.matmul` folds batches, or does not, by whether a factor wants a gradient; the two round differently.
    """
    for name in ("unet", "transformer"):
        if (denoiser := pipeline.components.get(name)) is not None:
            denoiser.requires_grad_(False)
    return pipeline


def picture(directory: Path, prompt: str, seed: int, steps: int, **options: Any) -> np.ndarray:
    """What the unsplit pipeline of SDXL in a directory makes."""
    pipeline = frozen(StableDiffusionXLPipeline.from_pretrained(directory))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipeline(prompt, num_inference_steps=steps, generator=generator, **options).images[0])


def tokenizer(directory: Path) -> CLIPTokenizer:
    """One token for each letter."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(directory / "vocab.json"),
        str(directory / "merges.txt"),
        model_max_length=TOKENS,
        pad_token=words[-1],
    )


def text_config(vocabulary: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        shift_factor=0.1,
    )


#: Three levels, of which the first has no attention, as SDXL's.
SDXL: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 2,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 1, 2),
    "projection_class_embeddings_input_dim": TEXT + 6 * 8,
    "cross_attention_dim": 2 * TEXT,
    "norm_num_groups": 8,
}

#: Four levels, of which the last has no attention, as SD 1.5's.
SD15: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (16, 32, 48, 48),
    "layers_per_block": 1,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "attention_head_dim": 4,
    "cross_attention_dim": TEXT,
    "norm_num_groups": 8,
}


def save_sdxl(directory: Path) -> Path:
    """Saves the pipeline under `directory`, in float32."""
    torch.manual_seed(0)
    words = tokenizer(directory / "words")
    config = text_config(len(words))
    pipeline = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=words,
        tokenizer_2=words,
        unet=UNet2DConditionModel(**SDXL),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )
    pipeline.save_pretrained(directory / "tiny-sdxl")
    return directory / "tiny-sdxl"


def save_ip_adapter(file: Path, pipeline: Path) -> Path:
    """Saves a random IP-Adapter for the UNet of a pipeline, as those on the hub are laid out."""
    torch.manual_seed(2)
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    width = unet.config.cross_attention_dim
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * width, IMAGE) / 4,
        "image_proj.proj.bias": torch.randn(4 * width) / 4,
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    attentions = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(attentions):
        inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for kind in "kv":
            tensors[f"ip_adapter.{2 * index + 1}.to_{kind}_ip.weight"] = torch.randn(inner, width) / 4
    save_file(tensors, file)
    return file


def save_sd15(directory: Path) -> Path:
    torch.manual_seed(0)
    words = tokenizer(directory / "words")
    pipeline = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(len(words))),
        tokenizer=words,
        unet=UNet2DConditionModel(**SD15),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory / "tiny-sd15")
    return directory / "tiny-sd15"


def t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    letters = [chr(code) for code in range(97, 123)]
    words = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("\u2581", -1.0),
        *((letter, -2.0) for letter in letters),
    ]
    config = T5Config(
        vocab_size=len(words) + 100, d_model=2 * TEXT, d_kv=8, d_ff=64, num_layers=2, num_heads=4, is_gated_act=True
    )
    return T5EncoderModel(config), T5Tokenizer(vocab=words, model_max_length=TOKENS)


#: Blocks of both kinds: with attention to the image alone as well, and without.
SD3: dict[str, Any] = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 7,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 2 * TEXT,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 2 * TEXT,
    "pos_embed_max_size": 32,
    "dual_attention_layers": (0, 1, 2),
    "qk_norm": "rms_norm",
}

FLUX: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 3,
    "num_single_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 2 * TEXT,
    "pooled_projection_dim": TEXT,
    "axes_dims_rope": (2, 2, 4),
    "guidance_embeds": True,
}


def save_sd3(directory: Path) -> Path:
    torch.manual_seed(0)
    words = tokenizer(directory / "words")
    config = text_config(len(words))
    encoder, pieces = t5()
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**SD3),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=words,
        text_encoder_3=encoder,
        tokenizer_3=pieces,
    )
    pipeline.save_pretrained(directory / "tiny-sd3")
    return directory / "tiny-sd3"


def save_flux(directory: Path) -> Path:
    torch.manual_seed(0)
    words = tokenizer(directory / "words")
    encoder, pieces = t5()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(len(words))),
        tokenizer=words,
        text_encoder_2=encoder,
        tokenizer_2=pieces,
        transformer=FluxTransformer2DModel(**FLUX),
    )
    pipeline.save_pretrained(directory / "tiny-flux")
    return directory / "tiny-flux"

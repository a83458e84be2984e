"""Random image requests, drawn from a seed: from prompt embeddings to latents."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

#: Fewest and most denoising steps of an image.
STEPS_RANGE = 3, 8

#: Widths and heights, in pixels. Latents have an eighth of them.
SIDES = (64, 96, 128)

#: Number of tokens in the prompt embeddings.
TOKENS = 8

#: Largest deviation from the unsplit pipeline's latents, relative to their maximum: a step that shares a forward
#: with other devices' steps rounds differently.
LATENT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class ImageRequest:
    """Arguments of a pipeline; `noise` is the seed of the initial latents."""

    options: dict[str, Any]
    noise: int

    @property
    def steps(self) -> int:
        return int(self.options["num_inference_steps"])

    def run(self, unet: Any) -> torch.Tensor:
        """The final latents, `[images, channels, height, width]`."""
        generator = torch.Generator().manual_seed(self.noise)
        output: torch.Tensor = _pipeline(unet)(generator=generator, output_type="latent", **self.options).images
        return output


def draw(seed: int, device: int, number: int, config: Any) -> ImageRequest:
    """The `number`-th request of a device, for a UNet with this configuration."""
    rng = random.Random(f"{seed} {device} {number}")
    noise = torch.Generator().manual_seed(rng.getrandbits(63))
    options: dict[str, Any] = {
        "num_inference_steps": rng.randint(*STEPS_RANGE),
        "num_images_per_prompt": rng.choice((1, 1, 2)),
        "guidance_scale": rng.choice((1.0, 4.0)),
        "width": rng.choice(SIDES),
        "height": rng.choice(SIDES),
        "prompt_embeds": torch.randn(1, TOKENS, config.cross_attention_dim, generator=noise),
    }
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        options["pooled_prompt_embeds"] = torch.randn(1, width, generator=noise)
    else:
        options["negative_prompt_embeds"] = torch.zeros_like(options["prompt_embeds"])
    return ImageRequest(options, rng.getrandbits(63))


def agree(latents: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether latents equal the unsplit pipeline's within `LATENT_TOLERANCE`."""
    if latents.shape != wanted.shape:
        return False
    return bool((latents - wanted).abs().max() <= LATENT_TOLERANCE * wanted.abs().max().clamp_min(1))


def _pipeline(unet: Any) -> Any:
    """A pipeline that consists of a UNet and a scheduler."""
    import diffusers

    scheduler = diffusers.EulerDiscreteScheduler()
    parts: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": unet}
    if unet.config.addition_embed_type == "text_time":
        more = {"text_encoder_2": None, "tokenizer_2": None}
        pipeline = diffusers.StableDiffusionXLPipeline(scheduler=scheduler, **parts, **more)
    else:
        more = {"safety_checker": None, "feature_extractor": None}
        pipeline = diffusers.StableDiffusionPipeline(
            scheduler=scheduler, requires_safety_checker=False, **parts, **more
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

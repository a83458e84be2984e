"""How large an image may be, by a denoiser's configuration. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Pixels for each latent pixel along a side, as far as limits are concerned: most VAEs have 8.
LATENT_PIXELS = 8

#: Most pixels of an image by default: as a multiple of what the model was made for, but not less than a megapixel.
#: Attention takes time by the square of it.
DEFAULT_SHARE = 4
MIN_MAX_PIXELS = 1024**2

#: Environment variable with the most pixels of an image, for workers and devices.
MAX_PIXELS = "LAMBDA_SPLIT_MAX_PIXELS"

#: Latent pixels along a side of the images that a model was made for, where diffusers' pipeline says so instead of
#: the denoiser's configuration.
_SAMPLE_SIZES = {"FluxTransformer2DModel": 128}


def sample_sides(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width, in latent pixels, of the images that a denoiser was made for; None if that is not known."""
    size = config.get("sample_size") or _SAMPLE_SIZES.get(str(config.get("_class_name")))
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        return None
    return sides[0], sides[1]


def native_pixels(config: Mapping[str, Any]) -> int:
    """Pixels of the images that a denoiser was made for; 0 if that is not known."""
    sides = sample_sides(config)
    return 0 if sides is None else sides[0] * sides[1] * LATENT_PIXELS**2


def default_max_pixels(config: Mapping[str, Any]) -> int:
    """Most pixels of an image that workers take by default."""
    return max(MIN_MAX_PIXELS, DEFAULT_SHARE * native_pixels(config))


def longest_side(config: Mapping[str, Any]) -> int | None:
    """Most latent pixels along a side, for which a transformer has positions; None without such a limit."""
    positions, patch = config.get("pos_embed_max_size"), config.get("patch_size", 1)
    return positions * patch if isinstance(positions, int) and isinstance(patch, int) else None

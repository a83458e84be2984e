"""How an image is made, and how it is written down."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from split_common.errors import ConfigError

#: Names of files, and what Pillow calls their formats.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

#: Pixels of an image's side, at most.
MAX_SIDE = 4096


@dataclass(frozen=True)
class ImageSettings:
    """Settings of an image; None leaves one to the model's own pipeline. The same seed gives the same image."""

    steps: int = 20
    width: int | None = None
    height: int | None = None
    guidance: float | None = None
    negative: str | None = None
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of a pipeline, but for the seed."""
        chosen = {
            "num_inference_steps": self.steps,
            "width": self.width,
            "height": self.height,
            "guidance_scale": self.guidance,
            "negative_prompt": self.negative,
        }
        return {name: value for name, value in chosen.items() if value is not None}


def parse_pixels(size: str) -> tuple[int, int]:
    """Width and height of a size like `512x768` or `512`. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", size, re.ASCII)
    if match is None:
        raise ConfigError(f"{size!r} is no size: write it like 512x512")
    return int(match[1]), int(match[2] or match[1])


class _Vae(msgspec.Struct):
    """Of the configuration of a pipeline's VAE: one entry for each level, of which each but the last halves."""

    block_out_channels: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]


def check_size(directory: str, settings: ImageSettings) -> None:
    """Raises ConfigError for an image of a size that the pipeline in `directory` cannot make."""
    sides = [side for side in (settings.width, settings.height) if side is not None]
    if not sides:
        return
    try:
        vae = msgspec.json.decode((Path(directory) / "vae/config.json").read_bytes(), type=_Vae)
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError):
        raise ConfigError(f"{directory} is no directory of a pipeline: vae/config.json cannot be read") from None
    scale = 2 ** (len(vae.block_out_channels) - 1)
    # Pipelines of UNets want sides by 8, whatever their VAE; transformers take 2x2 of its pixels for one token.
    multiple = max(8, scale) if (Path(directory) / "unet").is_dir() else 2 * scale
    for side in sides:
        if side not in range(multiple, MAX_SIDE + 1, multiple):
            raise ConfigError(
                f"{Path(directory).name} makes no side of {side} pixels: "
                f"take a multiple of {multiple}, {MAX_SIDE} pixels at most"
            )


def image_format(name: str) -> str:
    """What Pillow calls the format of a file of this name. Raises ConfigError."""
    ending = name[name.rfind(".") :].lower()
    if ending not in FORMATS:
        raise ConfigError(f"{name} is no name of an image: take one of {', '.join(FORMATS)}")
    return FORMATS[ending]


def image_bytes(image: Any, format_: str = "PNG") -> bytes:
    """An image of Pillow as a file."""
    content = io.BytesIO()
    image.save(content, format_)
    return content.getvalue()

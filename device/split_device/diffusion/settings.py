"""How an image is made, and how it is written down."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

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
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise ConfigError(f"{size!r} is no size: write it like 512x512; a side has {MAX_SIDE} pixels at most")
    return width, height


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

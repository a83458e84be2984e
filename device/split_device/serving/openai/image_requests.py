"""Requests for images in OpenAI's format."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from split_device.generation.settings import nth_seed
from split_device.images.settings import ImageSettings, parse_pixels
from split_device.serving.fields import convert, supported, treated

#: The path of requests for images.
IMAGE_PATH = "/v1/images/generations"

#: Number of denoising steps by quality, unless the request has `steps`.
STEPS_BY_QUALITY = {"auto": 20, "standard": 20, "medium": 20, "low": 10, "high": 40, "hd": 40}

#: Fields that are accepted and have no effect.
_IGNORED = frozenset({"user", "moderation", "style"})

#: Fields that are not supported, with the values at which they have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": ("b64_json",),
    "background": ("auto", "opaque"),
    "output_compression": (100,),
    "partial_images": (0,),
}


class ImageBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request's body. `steps` and what follows are extensions of OpenAI's format, with the bounds in `BOUNDS`."""

    prompt: Annotated[str, Meta(min_length=1, max_length=32_000)]
    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=10)] = 1
    size: str = "auto"
    quality: Literal["auto", "standard", "medium", "low", "high", "hd"] = "auto"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    stream: bool = False
    steps: int | None = None
    seed: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    metadata: bool = False

    def settings(self, seed: int | None) -> list[ImageSettings]:
        """The settings of each image. Raises ConfigError for a malformed size.

        Args:
            seed: that of the first image; with None, none has a seed.
        """
        width, height = parse_pixels(self.size) if self.size != "auto" else (None, None)
        steps = self.steps or STEPS_BY_QUALITY[self.quality]
        settings = ImageSettings(steps, width, height, self.guidance, self.negative_prompt, seed)
        if seed is None:
            return [settings] * self.n
        return [dataclasses.replace(settings, seed=nth_seed(seed, index)) for index in range(self.n)]


#: What is done with each field.
FIELDS = treated(ImageBody.__struct_fields__, _IGNORED, _NEUTRAL)


def parse_image(body: object) -> ImageBody:
    """Parses a request's body. Raises ApiError."""
    return convert(supported(body, _IGNORED, _NEUTRAL), ImageBody)

"""Settings of images, their file formats, and checks before a pipeline is loaded."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from split_common.errors import ConfigError
from split_common.models.checkpoint_files import directory_name
from split_common.models.denoisers.sizes import (
    LATENT_PIXELS,
    MAX_PIXELS,
    default_max_pixels,
    longest_side,
    sample_sides,
)
from split_common.system.files import is_there, user_path
from split_common.system.outputs import check_output, is_stream
from split_device.generation.settings import checked

_T = TypeVar("_T")

#: Environment variable with the default image model.
IMAGE_MODEL = "LAMBDA_SPLIT_IMAGE_MODEL"

#: How much of an initial image changes if no strength is named: 1 changes all of it.
STRENGTH = 0.6

#: Pillow's name of the format, by the extension of a file.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

#: Least and largest width and height of an image, in pixels. No VAE makes less of a latent pixel.
MIN_SIDE, MAX_SIDE = 8, 4096

#: Size of the seed that is drawn if none is given, in bits: short enough to type again, and exact in JavaScript.
DRAWN_SEED_BITS = 32


@dataclass(frozen=True)
class ImageSettings:
    """Settings of an image; None leaves one to the model's own pipeline. The same seed gives the same image."""

    steps: int = 20
    width: int | None = None
    height: int | None = None
    guidance: float | None = None
    negative: str | None = None
    seed: int | None = None

    def checked(self) -> ImageSettings:
        """A copy whose numbers are within their bounds. Raises ConfigError."""
        copy: ImageSettings = checked(self, ("steps", "guidance", "seed"))
        return copy

    def options(self) -> dict[str, Any]:
        """Arguments of a pipeline's call, except the seed."""
        chosen = {
            "num_inference_steps": self.steps,
            "width": self.width,
            "height": self.height,
            "guidance_scale": self.guidance,
            "negative_prompt": self.negative,
        }
        return {name: value for name, value in chosen.items() if value is not None}


def parse_pixels(size: str) -> tuple[int, int]:
    """Width and height, in pixels, of a size like `512x768` or `512`. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", size, re.ASCII)
    if match is None:
        raise ConfigError(f"invalid size {size!r}: expected WIDTHxHEIGHT, e.g. 512x512")
    return int(match[1]), int(match[2] or match[1])


def pipeline_directory(model: str | None) -> str:
    """The pipeline's absolute directory. Raises ConfigError if there is none."""
    if model is None or not model.strip():
        raise ConfigError(f"no image model: give --image-model, a pipeline's directory, or set {IMAGE_MODEL}")
    directory = user_path(model)
    is_there(directory)
    if not (directory / "model_index.json").is_file():
        raise ConfigError(f"{model} is not the directory of a pipeline: it has no model_index.json")
    return str(directory.resolve())


def need_diffusers() -> None:
    """Raises ConfigError if the packages for images are missing."""
    if importlib.util.find_spec("diffusers") is None or importlib.util.find_spec("PIL") is None:
        raise ConfigError("images need more packages: pip install 'lambda-split[diffusion]'")


class _Vae(msgspec.Struct):
    """The configuration of a pipeline's VAE: one entry for each level; each except the last halves the sides."""

    block_out_channels: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]


def check_size(directory: str, settings: ImageSettings) -> None:
    """Raises ConfigError for an image of a size that the pipeline in `directory` cannot make."""
    sides = [side for side in (settings.width, settings.height) if side is not None]
    if not sides:
        return
    shape = _PipelineShape.read(directory)
    for side in sides:
        if side not in range(shape.multiple, shape.longest + 1, shape.multiple):
            raise ConfigError(
                f"{shape.name} cannot make an image with a side of {side} px: expected a multiple of "
                f"{shape.multiple}, at most {shape.longest}"
            )
    native = shape.native or (sides[0], sides[0])
    shape.check_pixels(settings.width or native[0], settings.height or native[1])


def check_pixels(directory: str, width: int, height: int) -> None:
    """Raises ConfigError for an image with more pixels than workers take for the pipeline in `directory`."""
    _PipelineShape.read(directory).check_pixels(width, height)


@dataclass(frozen=True)
class _PipelineShape:
    """What sizes of images a pipeline can make."""

    name: str
    #: What the width and the height are multiples of, and at most.
    multiple: int
    longest: int
    #: Width and height of the images that it was made for; None if that is not known.
    native: tuple[int, int] | None
    #: Most pixels of an image.
    pixels: int

    @classmethod
    def read(cls, directory: str) -> _PipelineShape:
        """Raises ConfigError if a configuration is missing, or the environment's limit is not a number."""
        is_unet = (Path(directory) / "unet").is_dir()
        vae = _read_config(directory, "vae", _Vae)
        denoiser = _read_config(directory, "unet" if is_unet else "transformer", dict[str, Any])
        scale = 2 ** (len(vae.block_out_channels) - 1)
        latents, sides = longest_side(denoiser), sample_sides(denoiser)
        # Workers count as if each latent pixel were 8 by 8, whatever the VAE makes of it.
        limit = (_max_pixels() or default_max_pixels(denoiser)) * scale**2 // LATENT_PIXELS**2
        return cls(
            name=directory_name(Path(directory)),
            # UNets' pipelines need multiples of 8, whatever their VAE; a transformer's token is 2x2 latent pixels.
            multiple=max(8, scale) if is_unet else 2 * scale,
            longest=MAX_SIDE if latents is None else min(MAX_SIDE, latents * scale),
            native=None if sides is None else (sides[1] * scale, sides[0] * scale),
            pixels=limit,
        )

    def check_pixels(self, width: int, height: int) -> None:
        """Raises ConfigError for an image that is too large."""
        if width * height <= self.pixels:
            return
        made_for = f", which was made for {self.native[0]}x{self.native[1]}" if self.native else ""
        raise ConfigError(
            f"{width}x{height} is too large for {self.name}{made_for}: workers take at most {self.pixels:,} "
            f"pixels, unless {MAX_PIXELS} says otherwise, there and here"
        )


def _read_config(directory: str, part: str, type_: type[_T]) -> _T:
    """The configuration of a part of a pipeline. Raises ConfigError if it has none."""
    try:
        return msgspec.json.decode((Path(directory) / part / "config.json").read_bytes(), type=type_)
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError):
        raise ConfigError(
            f"{directory} is not the directory of a pipeline: it lacks a valid {part}/config.json"
        ) from None


def _max_pixels() -> int | None:
    """The most pixels of an image, by the environment. Raises ConfigError if it is not a number."""
    text = os.environ.get(MAX_PIXELS, "")
    if text and not (text.isascii() and text.isdigit() and int(text)):
        raise ConfigError(f"invalid {MAX_PIXELS} {text!r}: expected a number of pixels")
    return int(text) if text else None


def check_start(settings: ImageSettings, strength: float) -> None:
    """Raises ConfigError for settings that contradict an initial image, of which so much is to change."""
    if settings.width is not None or settings.height is not None:
        raise ConfigError("an initial image and a size do not go together: the initial image has a size")
    if int(settings.steps * strength) < 1:
        raise ConfigError(f"a strength of {strength:g} changes nothing in {settings.steps} steps")


def image_format(path: Path) -> str:
    """Pillow's name of the format of a file; PNG for pipes and devices. Raises ConfigError if it is unknown."""
    extension = path.name[path.name.rfind(".") :].lower()
    if extension not in FORMATS:
        if is_stream(path):
            return "PNG"
        raise ConfigError(f"invalid image file {path.name!r}: expected a name ending in {', '.join(FORMATS)}")
    return FORMATS[extension]


def check_image_output(path: Path, *inputs: Path | None) -> None:
    """Raises ConfigError if an image cannot be written to this path: see `split_common.system.outputs`."""
    image_format(path)
    check_output(path, *inputs)

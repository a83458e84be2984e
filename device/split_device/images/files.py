"""Files of images: one that an image begins with, and those that are made, with their settings and notes.

Settings and notes travel with a Pillow image as texts in its `info`, as they do in a PNG file.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

from split_common.errors import ConfigError
from split_common.system.outputs import write_output
from split_device.images.settings import MAX_SIDE, MIN_SIDE, image_format

#: Pillow's names of the formats that are read. Others may run programs (EPS), or hold no pixels.
_READ = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

#: Most pixels of an image that a model is shown: a photograph has seldom more. Decoded, they take 144 MiB.
MAX_PROMPT_PIXELS = 48 * 1024**2

#: Key of an image's settings, in the form that other programs read: prompt, negative prompt, a line of the rest.
PARAMETERS = "parameters"

#: Key of what was noticed while an image was made, one note per line.
_NOTES = "lambda-split notes"

#: EXIF's tags of the directory with details, and of the comment that JPEG and WebP files carry the settings in.
_EXIF_DETAILS, _EXIF_COMMENT = 0x8769, 0x9286

#: Largest value of a pixel in Pillow's modes with 16 bits.
_DEEP = 2**16 - 1


def read_image(path: Path) -> Any:
    """A file as an RGB Pillow image, upright, as diffusers' `load_image` gives it.

    EXIF's orientation is applied, transparency dropped, 16 bits become 8, and of an animation the first image is
    taken.

    Raises:
        ConfigError: the file cannot be read as an image, or has too many pixels, or too few.
    """
    return _decoded(path, str(path), MIN_SIDE, MAX_SIDE)


def read_prompt_image(source: Path | bytes, name: str) -> Any:
    """An image to show a model, a file or the content of one, like `read_image`.

    Args:
        name: what errors call it.

    Raises:
        ConfigError: it cannot be read as an image, or has more than `MAX_PROMPT_PIXELS` pixels.
    """
    return _decoded(source, name, 1, MAX_PROMPT_PIXELS, MAX_PROMPT_PIXELS)


def _decoded(source: Path | bytes, name: str, least: int, most: int, pixels: int = MAX_SIDE**2) -> Any:
    """An image whose sides have between `least` and `most` pixels, all in all at most `pixels`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.init()
    formats = [each for each in _READ if each in Image.OPEN]
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
        with image:
            # Known before any pixel is decoded.
            size = f"{name} has {image.width}x{image.height} pixels"
            if not least <= min(image.size) <= max(image.size) <= most:
                raise ConfigError(f"{size}: expected {least} to {most} a side")
            if image.width * image.height > pixels:
                raise ConfigError(f"{size}: expected {pixels:,} at most")
            return _rgb(ImageOps.exif_transpose(image))
    except ConfigError:
        raise
    except UnidentifiedImageError:
        raise ConfigError(f"{name} cannot be read as an image: expected one of {', '.join(formats)}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ConfigError(f"{name} is too large: {error}") from None
    # Each of Pillow's decoders has errors of its own for damaged files.
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name} cannot be read as an image: {reason}") from None


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits. Raises ConfigError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _rgb(image: Any) -> Any:
    """A Pillow image of any mode as RGB. Raises ValueError for numbers that are no brightness."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow would cut off at 255.
        return image.convert("I").point(lambda value: value * (255 / _DEEP)).convert("L").convert("RGB")
    return image.convert("RGB")


def image_bytes(image: Any, format_: str = "PNG", *, metadata: bool = True) -> bytes:
    """The content of a file with this Pillow image.

    Args:
        format_: Pillow's name of the format: PNG, JPEG or WEBP.
        metadata: whether the file carries the image's settings, its prompt included.
    """
    content = io.BytesIO()
    image.save(content, format_, **(_embedded(image, format_) if metadata else {}))
    return content.getvalue()


def write_image(image: Any, path: Path, *, metadata: bool = True) -> None:
    """Writes a Pillow image in the format of the path's extension: see `image_bytes`. Raises ConfigError."""
    write_output(path, image_bytes(image, image_format(path), metadata=metadata))


def _embedded(image: Any, format_: str) -> dict[str, Any]:
    """Options with which Pillow writes an image's settings and notes."""
    from PIL import Image, PngImagePlugin

    texts = {key: text for key in (PARAMETERS, _NOTES) if (text := image.info.get(key))}
    if not texts:
        return {}
    if format_ == "PNG":
        info = PngImagePlugin.PngInfo()
        for key, text in texts.items():
            info.add_itxt(key, text)
        return {"pnginfo": info}
    exif = Image.Exif()
    comment = texts.get(PARAMETERS, "").encode("utf-16-be", "replace")
    exif.get_ifd(_EXIF_DETAILS)[_EXIF_COMMENT] = b"UNICODE\0" + comment
    return {"exif": exif}


def note(image: Any, text: str) -> None:
    """Adds what was noticed while an image was made to the image."""
    image.info[_NOTES] = "\n".join([*notes(image), " ".join(text.split())])


def notes(image: Any) -> list[str]:
    """What was noticed while an image was made: a prompt that was cut off, say. Empty if all is well."""
    text: str = image.info.get(_NOTES, "")
    return text.splitlines()

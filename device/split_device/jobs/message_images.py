"""Images in the messages of a conversation: references to files, and what they show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from split_common.errors import ConfigError
from split_common.system.files import user_path
from split_device.generation.shown_images import ShownImage
from split_device.images.files import file_digest, read_prompt_image
from split_device.jobs.job import Message, MessageImage

#: Most images of a conversation.
MAX_IMAGES = 256

#: Most pixels of all images of a conversation. Decoded, they take 576 MiB.
MAX_PIXELS = 192 * 1024**2


def image_file(path: Path, at: int = 0) -> MessageImage:
    """A reference to a file, for a job that runs later. Raises ConfigError if it cannot be read as an image."""
    path = user_path(str(path)).resolve()
    read_prompt_image(path, str(path))
    return MessageImage(at=at, path=str(path), sha256=file_digest(path))


def image_content(path: Path, name: str) -> MessageImage:
    """A file's content, for an answer at once. Raises ConfigError, which calls it `name`, if it is not an image."""
    try:
        # Once: it may be a pipe.
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name} cannot be read as an image: {reason}") from None
    read_prompt_image(data, name)
    return MessageImage(at=0, data=data)


def count_images(messages: Sequence[Message]) -> int:
    return sum(1 for _ in _images(messages))


def has_images(messages: Sequence[Message]) -> bool:
    return count_images(messages) > 0


def shown_images(messages: Sequence[Message]) -> list[ShownImage]:
    """The images of a conversation, decoded.

    Raises:
        ConfigError: there are too many, or one cannot be read, or has too many pixels, or its file has changed
            since it was referred to.
    """
    if count_images(messages) > MAX_IMAGES:
        raise ConfigError(f"this conversation has more than {MAX_IMAGES} images: show fewer")
    shown: list[ShownImage] = []
    pixels = 0
    for index, image in _images(messages):
        shown.append(ShownImage(_read(image, f"image {len(shown) + 1}"), index, image.at))
        width, height = shown[-1].image.size
        pixels += width * height
        if pixels > MAX_PIXELS:
            raise ConfigError(f"the images of this conversation have more than {MAX_PIXELS:,} pixels: show fewer")
    return shown


def _images(messages: Sequence[Message]) -> Iterator[tuple[int, MessageImage]]:
    """All images, with the index of their message."""
    for index, message in enumerate(messages):
        for image in () if isinstance(message.images, msgspec.UnsetType) else message.images:
            yield index, image


def _read(image: MessageImage, name: str) -> object:
    if not isinstance(image.data, msgspec.UnsetType):
        return read_prompt_image(image.data, name)
    if isinstance(image.path, msgspec.UnsetType) or isinstance(image.sha256, msgspec.UnsetType):
        raise ConfigError(f"{name} has neither a file with its SHA-256 nor content")
    path = Path(image.path)
    if file_digest(path) != image.sha256:
        raise ConfigError(f"{path} has changed since the request was made: make it again")
    return read_prompt_image(path, str(path))

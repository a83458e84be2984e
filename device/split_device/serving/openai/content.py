"""The parts of a message's content in OpenAI's format: texts, and images between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from split_device.jobs.job import MessageImage
from split_device.serving.media import parse_image_url


class TextPart(msgspec.Struct, frozen=True, tag="text", tag_field="type"):
    text: str


class _ImageUrl(msgspec.Struct, frozen=True):
    url: str
    #: Has no effect, as in vLLM: the checkpoint's processor decides on an image's size.
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(msgspec.Struct, frozen=True, tag="image_url", tag_field="type"):
    image_url: _ImageUrl


#: The content of a message that may have images.
ContentWithImages = str | list[TextPart | ImagePart]


def text_and_images(
    content: str | Sequence[TextPart | ImagePart], where: str
) -> tuple[str, tuple[MessageImage, ...] | msgspec.UnsetType]:
    """The text of a message, and its images.

    Args:
        where: the message's path in the body.

    Raises:
        ApiError: a URL is not one of an image that is sent or may be read.
    """
    if isinstance(content, str):
        return content, msgspec.UNSET
    text = ""
    images = []
    for index, part in enumerate(content):
        if isinstance(part, TextPart):
            text += part.text
        else:
            field = f"{where}.content[{index}].image_url.url"
            images.append(parse_image_url(part.image_url.url, len(text), field))
    return text, tuple(images) if images else msgspec.UNSET

"""Images among the parts of a message's content in OpenAI's format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from split_device.jobs.job import Message
from split_device.serving.fields import ApiError, convert, present
from split_device.serving.media import parse_image_url

#: Fields of a part that are accepted and have no effect: what is cached does not depend on them.
_IGNORED = frozenset({"prompt_cache_breakpoint", "cache_control"})


class _ImageUrl(msgspec.Struct, frozen=True):
    url: str
    #: Has no effect, as in vLLM: the checkpoint's processor decides on an image's size.
    detail: Literal["auto", "low", "high", "original"] = "auto"


class _ImagePart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["image_url"]
    image_url: _ImageUrl


def with_images(parse: Callable[[object, str], Message], message: object, where: str) -> Message:
    """A message, of which `parse` sees the texts alone.

    Args:
        parse: parses a message whose content is a text, or has parts that are texts.
        where: the message's path in the body.

    Raises:
        ApiError: as `parse`, or an image is not where it may be, or its URL is not one that is read.
    """
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list) or not any(map(_is_image, parts)):
        return parse(message, where)
    assert isinstance(message, dict)
    if message.get("role") != "user":
        raise ApiError(f"{where}.content: only messages of the user have images", param=f"{where}.content")
    images = []
    texts: list[Any] = []
    before = 0
    for index, part in enumerate(parts):
        if not _is_image(part):
            texts.append(part)
            text = part.get("text") if isinstance(part, dict) else None
            before += len(text) if isinstance(text, str) else 0
            continue
        field = f"{where}.content[{index}]"
        given = {name: value for name, value in present(part).items() if name not in _IGNORED}
        if isinstance(url := given.get("image_url"), dict):
            given["image_url"] = present(url)
        image = convert(given, _ImagePart, field)
        images.append(parse_image_url(image.image_url.url, before, f"{field}.image_url.url"))
        # In its place, so that errors have the other parts' indices.
        texts.append({"type": "text", "text": ""})
    parsed = parse({**message, "content": texts}, where)
    return msgspec.structs.replace(parsed, images=tuple(images))


def _is_image(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "image_url"

"""Images in requests: data URLs, and files below directories that the server's user allows."""

from __future__ import annotations

import base64
import binascii
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec

from split_common.errors import ConfigError
from split_common.system.files import user_path
from split_device.images.files import file_digest
from split_device.jobs.job import Message, MessageImage, Task
from split_device.jobs.message_images import MAX_IMAGES, count_images
from split_device.serving.fields import ApiError

#: Most bytes of an image's file.
MAX_IMAGE_BYTES = 32 * 1024**2

_ALLOW = "--allowed-local-media-path"


def parse_image_url(url: str, at: int, where: str) -> MessageImage:
    """The image of a URL. Nothing is fetched, and no file is read.

    Args:
        at: how many characters of the message's text come before it.
        where: the path of the field that has the URL.

    Raises:
        ApiError: it is not a data URL with base64, nor one of a local file.
    """
    if found := re.match(r"data:[^,;]*(;[^,;]*)*?;base64,", url, re.IGNORECASE):
        return MessageImage(at=at, data=image_data(url[found.end() :], where))
    if (path := _file_path(url)) is None:
        scheme = url.partition(":")[0][:20]
        raise ApiError(
            f"{where}: {scheme!r} URLs are not fetched: send the image itself (data:image/png;base64,…), or the "
            "file:// URL of a file that may be read here",
            param=where,
            code="unsupported_parameter",
        )
    return MessageImage(at=at, path=path)


def _file_path(url: str) -> str | None:
    """The path of a URL of a file on this machine; None if it is another URL."""
    try:
        parsed = urlsplit(url)
    except ValueError:
        return None
    local = parsed.scheme == "file" and parsed.netloc in ("", "localhost") and parsed.path.startswith("/")
    return unquote(parsed.path) if local and not parsed.query and not parsed.fragment else None


def image_data(text: str, where: str) -> bytes:
    """The content of an image's file, of its base64. Raises ApiError if that is invalid, or too long."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(f"{where}: invalid base64", param=where) from None
    if not 0 < len(data) <= MAX_IMAGE_BYTES:
        raise ApiError(f"{where}: {len(data):,} bytes, expected 1 to {MAX_IMAGE_BYTES:,}", param=where)
    return data


def media_directories(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Directories of an option, absolute and without links. Raises ConfigError if one is not a directory."""
    found = tuple(user_path(str(path)).resolve() for path in paths)
    for path in found:
        if not path.is_dir():
            raise ConfigError(f"{_ALLOW} {path} is not a directory")
    return found


def with_local_files(task: Task, directories: Sequence[Path]) -> Task:
    """A task whose images in files have the SHA-256 of their content. It reads each file once.

    Raises:
        ApiError: a file is not below one of the directories, or cannot be read; or there are too many images.
    """
    if isinstance(task.prompt, str):
        return task
    if count_images(task.prompt) > MAX_IMAGES:
        raise ApiError(f"the conversation has more than {MAX_IMAGES} images: show fewer", param="messages")
    digest = functools.cache(file_digest)
    messages = tuple(_with_files(each, directories, digest, f"messages[{i}]") for i, each in enumerate(task.prompt))
    return msgspec.structs.replace(task, prompt=messages) if messages != task.prompt else task


def _with_files(
    message: Message, directories: Sequence[Path], digest: Callable[[Path], str], where: str
) -> Message:
    if isinstance(message.images, msgspec.UnsetType):
        return message
    images = tuple(_with_digest(image, directories, digest, f"{where}.content") for image in message.images)
    return msgspec.structs.replace(message, images=images)


def _with_digest(
    image: MessageImage, directories: Sequence[Path], digest: Callable[[Path], str], where: str
) -> MessageImage:
    if isinstance(image.path, msgspec.UnsetType):
        return image
    if not directories:
        raise ApiError(
            f"{where}: local files are not read without {_ALLOW}", param=where, code="unsupported_parameter"
        )
    try:
        path = Path(image.path).resolve()
    except (OSError, ValueError, RuntimeError):
        path = Path("/")
    if not any(path.is_relative_to(directory) for directory in directories):
        raise ApiError(f"{where}: the file is not below a directory of {_ALLOW}", param=where)
    try:
        if not path.is_file() or path.stat().st_size > MAX_IMAGE_BYTES:
            raise ApiError(f"{where}: not a file, or of more than {MAX_IMAGE_BYTES:,} bytes", param=where)
        return msgspec.structs.replace(image, path=str(path), sha256=digest(path))
    except (OSError, ConfigError):
        raise ApiError(f"{where}: the file cannot be read", param=where) from None

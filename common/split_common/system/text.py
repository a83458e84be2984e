"""Where text comes in and goes out: files, pipes, arguments and bodies of requests, and lines of JSON."""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from pathlib import Path

import msgspec

from split_common.errors import ConfigError

#: Byte order marks. That of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)

#: What JSON may hold as it is, although some readers end a line there, a terminal obeys it, or UTF-8 has no bytes
#: for it. Control characters below U+0020 are always escaped.
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


def without_mark(data: bytes, name: str) -> bytes:
    """UTF-8 without its byte order mark.

    Args:
        data: the text, or its beginning.
        name: what the text is, for the error.

    Raises:
        ConfigError: the text is UTF-16 or UTF-32.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            raise ConfigError(f"{name} is {encoding}: save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def decode_text(data: bytes, name: str, encoding: str = "utf-8") -> str:
    """Text of a file or pipe, without a byte order mark.

    Args:
        name: what the text is, for the error.

    Raises:
        ConfigError: the bytes are not text in this encoding.
    """
    text = without_mark(data, name)
    if b"\0" in text:
        raise ConfigError(f"{name} is not text: it has a NUL byte")
    try:
        return text.decode("utf-8" if len(text) < len(data) else encoding)
    except UnicodeError:
        raise ConfigError(f"{name} is not {encoding.upper()}") from None


def read_text(path: Path, name: str | None = None) -> str:
    """The text of a file. Raises ConfigError if it cannot be read, or is not UTF-8."""
    name = name or str(path)
    try:
        return decode_text(path.read_bytes(), name)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def check_text(text: str, name: str) -> str:
    """Returns the text. Raises ConfigError if it came from bytes of no UTF-8, or has half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} is not UTF-8") from None
    return text


def parse_json(data: bytes | bytearray, name: str) -> object:
    """A value from JSON in UTF-8, with or without a byte order mark.

    Args:
        name: what the JSON is, for the error.

    Raises:
        ConfigError: it is not JSON. The message has no part of it.
    """
    text = without_mark(bytes(data), name)
    try:
        return msgspec.json.decode(text)
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{name} is not JSON: it is nested too deeply") from None
    except msgspec.DecodeError as error:
        reason = "half of a surrogate pair" if _HALF_PAIR.search(text) and _is_json(text) else str(error)
        raise ConfigError(f"{name} is not JSON: {reason}") from None


def json_line(value: object) -> str:
    """JSON on one line, wherever its reader takes a line to end."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def for_terminal(text: str) -> str:
    """Text without the control characters that a terminal obeys, except line breaks and tabs."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True

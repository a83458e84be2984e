"""Settings that save bytes or calls of the worker: codecs and reuse. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import get_args

from split_common.errors import ConfigError
from split_common.protocol import payloads
from split_common.protocol.capabilities import StatesCodec

#: The old name of "exact", for images; the one that is stored with jobs.
OLD_EXACT = "none"

#: Codecs of an image's states, by the names of the option; "exact" sends them as they are.
CODECS: dict[str, payloads.Codec | None] = {
    "exact": None,
    OLD_EXACT: None,
    "fp16": "float16",
    "int8": "int8",
    "int4": "int4",
}

#: Codecs of a text's states (`split_common.models.codecs`).
TEXT_CODECS = ("exact", *get_args(StatesCodec))

#: Values of `--codec`: some for texts or for images only.
CODEC_NAMES = ("exact", "lossless", "fp16", "int8", "int4")


def parse_codec(text: str) -> str:
    """A value of `--codec`. Raises ConfigError."""
    return known_codec("exact" if text == OLD_EXACT else text, CODEC_NAMES)


def known_codec(name: str, codecs: Collection[str]) -> str:
    """Returns the name of one of these codecs. Raises ConfigError for another name."""
    if name not in codecs:
        known = (each for each in codecs if each != OLD_EXACT)
        raise ConfigError(f"invalid codec {name!r}: expected one of {', '.join(known)}")
    return name


def check_codec(name: str, codecs: Collection[str], kind: str) -> str:
    """Returns a codec that a kind of models has ("texts", "images"). Raises ConfigError for another one."""
    if name not in codecs:
        raise ConfigError(f"--codec {name} is not for {kind}: choose one of {', '.join(codecs)}")
    return name


def check_reuse(reuse: float) -> float:
    """Returns a number of steps from 1, or a threshold between 0 and 1. Raises ConfigError for other values."""
    if not (0 < reuse < 1 or (reuse >= 1 and float(reuse).is_integer())):
        raise ConfigError(f"invalid reuse {reuse}: expected a number of steps, or a threshold between 0 and 1")
    return reuse


def parse_reuse(text: str) -> float:
    """Parses a number of steps or a threshold. Raises ConfigError if it is neither."""
    try:
        return check_reuse(float(text))
    except ValueError:
        raise ConfigError(
            f"invalid reuse {text!r}: expected a number of steps, like 2, or a threshold, like 0.05"
        ) from None

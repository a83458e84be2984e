"""Settings that save bytes or calls of the worker: codecs and reuse. Needs no torch."""

from __future__ import annotations

from split_common.errors import ConfigError
from split_common.protocol import payloads

#: Codecs of the states that travel, by the names of the option; "none" sends them as they are.
CODECS: dict[str, payloads.Codec | None] = {"none": None, "fp16": "float16", "int8": "int8", "int4": "int4"}


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

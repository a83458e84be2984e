"""An image in a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ShownImage:
    """An image of Pillow, in RGB, and its place in a conversation."""

    image: Any
    #: The index of its message, and how many characters of that come before it.
    message: int
    at: int = 0

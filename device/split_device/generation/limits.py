"""Limits of what one process runs at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How much one process runs at once.

    Args:
        requests: generations (or jobs) at once; further ones wait.
        kv_memory: bytes for the keys and values of each model's head and tail; 1 GiB if None.
        images: images at once.
    """

    requests: int = 64
    kv_memory: int | None = None
    images: int = 2

"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: torch's generators take seeds modulo this.
SEED_BOUND = 2**64


@dataclass(frozen=True)
class Sampling:
    """Settings of a generation; greedy if the temperature is 0."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of `generate`. They replace the checkpoint's own sampling settings."""
        if not self.temperature:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}

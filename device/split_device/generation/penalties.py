"""Logits processors that transformers lacks: OpenAI's penalties, and constraints."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

from split_device.generation.request import Constraint


class OccurrencePenalty(LogitsProcessor):  # type: ignore[misc]
    """Makes tokens that were generated before less likely, as OpenAI's API and vLLM do.

    Args:
        prompt: number of tokens that precede the generated ones, and do not count.
        frequency: subtracted from a token's logit once for each time that it was generated.
        presence: subtracted once from the logit of each token that was generated.
    """

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self.prompt = prompt
        self.frequency = frequency
        self.presence = presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        generated = input_ids[:, self.prompt :]
        counts = torch.zeros_like(scores).scatter_add(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


class ConstraintMask(LogitsProcessor):  # type: ignore[misc]
    """Takes away the tokens that a constraint rules out, for a batch of one."""

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint
        self._prepared: tuple[int | None, torch.Tensor | None] | Exception | None = None

    def prepare(self) -> None:
        """Finds out what may come next, which takes a grammar up to some 10 ms. The next call then takes none."""
        try:
            self._prepared = self._look()
        except Exception as error:
            self._prepared = error

    def _look(self) -> tuple[int | None, torch.Tensor | None]:
        token = self.constraint.forced()
        return token, self.constraint.mask() if token is None else None

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        prepared, self._prepared = self._prepared, None
        if isinstance(prepared, Exception):
            raise prepared
        token, mask = prepared or self._look()
        if token is not None:
            # Whatever other processors say of it.
            scores = torch.full_like(scores, -torch.inf)
            scores[:, token] = 0.0
            return scores
        return scores if mask is None else scores.masked_fill(~mask.to(scores.device), -torch.inf)

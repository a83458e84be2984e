"""Finds out whether a model has spans: tokens of one image, say, that attend to each other both ways."""

from __future__ import annotations

import logging
from typing import Any

import torch

log = logging.getLogger(__name__)

#: Tokens of the probe.
_TOKENS = 3


def has_spans(model: Any, width: int) -> bool:
    """Whether what kind tokens are of decides which of those after them they see.

    Asks the code that makes the masks of `generate`, which models with spans bring along.

    Args:
        model: of the checkpoint's class.
        width: of its embeddings.
    """
    make_masks = getattr(model, "create_masks_for_generate", None)
    if make_masks is None:
        return False
    given = {
        "inputs_embeds": torch.zeros(1, _TOKENS, width),
        "attention_mask": torch.ones(1, _TOKENS, dtype=torch.long),
        "position_ids": torch.arange(_TOKENS)[None],
    }
    for kind in (0, 1):
        types = torch.full((1, _TOKENS), kind)
        try:
            masks = make_masks(
                model.config,
                **given,
                cache=None,
                token_type_ids=types,
                mm_token_type_ids=types,
                is_first_iteration=True,
            )
        except Exception as error:
            log.info("spans are refused: %s: %s", type(error).__name__, error)
            return False
        if any(map(_shows_a_later_token, masks.values() if isinstance(masks, dict) else [masks])):
            return True
    return False


def _shows_a_later_token(mask: Any) -> bool:
    """Whether the first token sees the last one, by a mask `[batch, heads, queries, keys]`."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        return False
    seen = mask if mask.dtype == torch.bool else mask >= 0
    return bool(seen[..., 0, -1].any())

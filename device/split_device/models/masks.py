"""The 2-D attention mask behind the masks that a model prepares for its decoder.

A model of several parts, such as one that sees images, makes the masks of all layers before it calls its decoder.
What travels is the mask that the model itself was given, provided that the prepared ones follow from it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import create_masks_for_generate

from split_common.errors import UnsupportedFeature

_REFUSED = "prepared attention masks cannot be split: pass a 2-D attention_mask"


def plain_mask(config: Any, given: dict[str, Any], cache: Any, outer: torch.Tensor | None) -> torch.Tensor | None:
    """The mask `[batch, cached and new tokens]` of a call of the decoder; None without padding.

    Args:
        config: the model's configuration.
        given: the decoder's arguments, by name.
        cache: what the tokens are appended to, if anything.
        outer: the mask that the model around the decoder was given.

    Raises:
        UnsupportedFeature: the decoder was given masks that do not follow from a 2-D mask.
    """
    mask, states = given.get("attention_mask"), given.get("inputs_embeds")
    if isinstance(mask, torch.Tensor) and (mask.ndim == 2 or outer is None or outer.ndim != 2):
        return mask
    if mask is None and (outer is None or bool(outer.all())):
        return outer
    if states is None or (outer is not None and outer.ndim != 2):
        raise UnsupportedFeature(_REFUSED)
    plain = create_masks_for_generate(
        config=config.get_text_config(decoder=True),
        inputs_embeds=states,
        attention_mask=outer,
        cache=cache,
        # Without a block, so that the masks are made, also where SDPA would need none.
        block_sequence_ids=torch.full(states.shape[:2], -1, device=states.device),
    )
    prepared = mask if isinstance(mask, dict) else {"": mask}
    expected = plain if isinstance(plain, dict) else {"": plain}
    if not prepared.keys() <= expected.keys():
        raise UnsupportedFeature(_REFUSED)
    for kind, one in prepared.items():
        if not torch.equal(_visible(one, expected[kind]), _visible(expected[kind], expected[kind])):
            raise UnsupportedFeature(
                "attention masks that depend on what the tokens are, e.g. of images that attend both ways, cannot "
                "be split"
            )
    return outer


def _visible(mask: torch.Tensor | None, like: torch.Tensor | None) -> torch.Tensor:
    """Which keys each query attends to, bool `[batch, 1, queries, keys]`. None stands for a causal mask."""
    if mask is None:
        assert like is not None
        queries, keys = like.shape[-2:]
        return (
            torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries).expand(like.shape)
        )
    return mask if mask.dtype == torch.bool else mask >= 0

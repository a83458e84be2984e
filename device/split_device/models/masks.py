"""The 2-D attention mask behind the masks that a model prepares for its decoder.

A model of several parts, such as one that sees images, makes the masks of all layers before it calls its decoder.
What travels is the mask that the model itself was given, provided that the prepared ones follow from it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import create_masks_for_generate

from split_common.errors import UnsupportedFeature
from split_device.models.traits import Traits

_REFUSED = "prepared attention masks do not run split: pass a 2-D attention_mask"


def plain_mask(
    config: Any, given: dict[str, Any], cache: Any, outer: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mask `[batch, cached and new tokens]` of a call of the decoder, and which tokens attend to later ones.

    Args:
        config: the model's configuration.
        given: the decoder's arguments, by name.
        cache: what the tokens are appended to, if anything.
        outer: the mask that the model around the decoder was given.

    Returns:
        The mask, None without padding; and how many of the tokens after it each token attends to, int64
        `[batch, new tokens]`, None if there are none.

    Raises:
        UnsupportedFeature: the decoder was given masks that do not follow from a 2-D mask and spans of tokens.
    """
    mask, states = given.get("attention_mask"), given.get("inputs_embeds")
    if isinstance(mask, torch.Tensor) and (mask.ndim == 2 or outer is None or outer.ndim != 2):
        return mask, None
    if mask is None and (outer is None or bool(outer.all())):
        return outer, None
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
    ahead: torch.Tensor | None = None
    for kind, one in prepared.items():
        wanted = expected[kind]
        if one is not None and wanted is not None and one.ndim == wanted.ndim == 2 and torch.equal(one, wanted):
            # The padding's, as a recurrent layer takes it.
            continue
        if wanted is None:
            if one is None:
                continue
            raise UnsupportedFeature(_REFUSED)
        base = _visible(wanted, wanted)
        shown = _visible(one, base)
        found = _ahead(shown & ~base)
        if ahead is None:
            ahead = found
        if not (torch.equal(found, ahead) and torch.equal(shown, base | _shown(ahead, base))):
            raise UnsupportedFeature(
                "unsupported attention mask: it has to follow from a 2-D attention_mask, and a token may see later "
                "ones only within its own span (an image, for example)"
            )
    return outer, ahead if ahead is not None and bool(ahead.any()) else None


def token_columns(
    columns: torch.Tensor | None, batch: int, tokens: int, mask: torch.Tensor | None, traits: Traits
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which cached columns, and which of the new ones, are tokens: two bool `[batch, …]` on the CPU.

    Args:
        columns: the cached ones, `[batch, columns]`; None if there are none.
        batch, tokens: the number of rows, and of new columns.
        mask: an attention mask, `[batch, cached and new columns]`; None without padding.
        traits: of the body.

    Raises:
        UnsupportedFeature: the mask cannot be expressed as a KV cache.
    """
    cached = columns if columns is not None else torch.ones(batch, 0, dtype=torch.bool)
    if len(cached) != batch:
        raise UnsupportedFeature(f"the cache has {len(cached)} rows, the batch has {batch}")
    past = cached.shape[1]
    if mask is None:
        full = torch.ones(batch, past + tokens, dtype=torch.bool)
        if not traits.attends:
            full[:, :past] = cached
    elif mask.ndim != 2 or tuple(mask.shape) != (batch, past + tokens):
        raise UnsupportedFeature(
            f"an attention mask of shape {tuple(mask.shape)} does not run split: it must be 2-D, "
            f"[{batch}, {past + tokens}] (batch, cached and new tokens)"
        )
    else:
        full = mask.to("cpu", torch.bool)
    if not torch.equal(full[:, :past], cached):
        raise UnsupportedFeature(
            "the attention mask hides or reveals tokens that are already cached, e.g. a pad token that was "
            "generated in an earlier turn: pass an attention_mask that keeps them as they were"
        )
    if traits.counts_indices:
        before = full.cummax(1).values & ~full
        if bool((before.cummax(1).values & full)[:, past:].any()):
            raise UnsupportedFeature(
                "padding between tokens does not run split with layers that count cache indices (sliding "
                "windows) or keep states (recurrences, convolutions)"
            )
    return cached, full[:, past:]


def _ahead(more: torch.Tensor) -> torch.Tensor:
    """How many of the tokens after it each token sees, int64 `[batch, queries]`, if `more` is what it also sees."""
    _, _, queries, keys = more.shape
    columns = torch.arange(keys, device=more.device)
    last = torch.where(more[:, 0], columns, -1).amax(-1)
    own = torch.arange(keys - queries, keys, device=more.device)
    return (last - own).clamp(min=0)


def _shown(ahead: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What tokens see of those after them, bool of the shape of a mask."""
    queries, keys = like.shape[-2:]
    own = torch.arange(keys - queries, keys, device=like.device)[None, :, None]
    columns = torch.arange(keys, device=like.device)[None, None]
    return ((columns > own) & (columns <= own + ahead[:, :, None]))[:, None].expand(like.shape)


def _visible(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Which keys each query attends to, bool `[batch, 1, queries, keys]`. None stands for a causal mask."""
    if mask is None:
        queries, keys = like.shape[-2:]
        return (
            torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries).expand(like.shape)
        )
    return mask if mask.dtype == torch.bool else mask >= 0

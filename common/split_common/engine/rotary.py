"""Rotary embeddings that depend on a sequence's length, computed for each sequence separately.

Dynamic-NTK and LongRoPE scaling choose frequencies by the largest position of the whole batch. Packed with a longer
sequence, a shorter one would be rotated differently than when it runs alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from split_common.engine.attention import current


class PerSequenceRotary(nn.Module):
    """Wraps a rotary embedding of transformers. Takes the packed positions, int64 `[1, tokens]`."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        batch = current.get(None)
        counts = list(batch.counts) if batch is not None else [position_ids.shape[1]]
        parts = []
        for positions in torch.split(position_ids, counts, dim=1):
            self._reset()
            parts.append(self.rotary(x, positions, *args, **kwargs))
        return tuple(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))

    def _reset(self) -> None:
        """Forgets the longest sequence so far, as in a model that was just loaded."""
        rotary: Any = self.rotary
        for name, original in list(vars(rotary).items()) + list(rotary.named_buffers()):
            if name.endswith("original_inv_freq"):
                rotary.register_buffer(name.replace("original_", ""), original.clone(), persistent=False)
            elif name.endswith("max_seq_len_cached"):
                setattr(rotary, name, rotary.original_max_seq_len)


def isolate_rotary(owner: nn.Module) -> None:
    """Wraps every rotary embedding below `owner` that depends on the batch's largest position."""
    for parent in list(owner.modules()):
        for name, child in list(parent.named_children()):
            types = getattr(child, "rope_type", None)
            names = types.values() if isinstance(types, dict) else [types]
            if any("dynamic" in str(kind) or kind == "longrope" for kind in names):
                setattr(parent, name, PerSequenceRotary(child))

"""A draft model: a small language model on this device that drafts for all requests of a generator.

After "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192): the small model goes on with a
text by itself, and the large one checks that in one step. The small one runs whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from split_common.engine.sequences import KVSequence
from split_device.generation.draft_layers import DraftLayers, check_tokens
from split_device.generation.loaded_drafts import DraftSequence, LoadedDrafts


class DraftModel(LoadedDrafts[DraftSequence]):
    """Drafts by a model that knows nothing of the split one.

    Args:
        name: the directory or hub id of its checkpoint.
        model: the split model that it drafts for.
        vocabulary: number of that model's logits.
        kv_bytes: memory for its keys and values.
        tokenizer: the one that is used with that model; None for the one beside it.

    Raises:
        ConfigError: its tokens are not those of the split model.
        UnsupportedFeature: it cannot draft; the message has the reason.
        SplitError: it cannot be loaded; as `load_whole`, and ModelError if the memory holds no page of tokens.
    """

    def __init__(self, name: str, model: Any, vocabulary: int, kv_bytes: int, tokenizer: Any = None) -> None:
        check_tokens(name, str(model.name_or_path), model.revision, tokenizer)
        self._layers = DraftLayers(name, model.dtype, next(model.parameters()).device, kv_bytes)
        known = self._layers.vocabulary
        super().__init__("the draft model", self._layers.runner, known, min(known, vocabulary))

    def _sequence(self, cache: KVSequence, cost: int, most_tokens: int) -> DraftSequence:
        return DraftSequence(cache, cost, most_tokens)

    def _inputs(self, parts: Sequence[tuple[DraftSequence, list[int]]]) -> torch.Tensor:
        tokens = [token for _, part in parts for token in part]
        positions = [position for sequence, part in parts for position in sequence.positions(part)]
        return self._layers.ends.embed(tokens, positions, [None] * len(tokens))

    def _logits(self, outputs: torch.Tensor) -> torch.Tensor:
        return self._layers.ends.logits(outputs, [None] * len(outputs))

"""The layers of a draft model, and what it must be: packed, able to take tokens back, with the same tokens."""

from __future__ import annotations

from typing import Any

import torch

from split_common.engine.runner import build_runner
from split_common.errors import ConfigError, UnknownModel, UnsupportedFeature
from split_common.models.loading import strip
from split_common.models.split import Split
from split_device.generation.local_layers import EmbeddingAndHead, pack_weights
from split_device.generation.tokenizing import load_tokenizer
from split_device.models.shared import shared_copy
from split_device.models.traits import keeps_states
from split_device.models.whole import load_whole
from split_device.speculation.names import DRAFT


class DraftLayers:
    """A whole model, which runs new tokens of many sequences in one forward. Not thread-safe.

    Args:
        name: the directory or hub id of its checkpoint.
        dtype: of its parameters and states; None keeps the checkpoint's.
        device: where it computes.
        kv_bytes: memory for its keys and values.

    Raises:
        UnsupportedFeature: it cannot draft; the message has the reason.
        SplitError: it cannot be loaded; as `load_whole`, and ModelError if the memory holds no page of tokens.
    """

    def __init__(self, name: str, dtype: torch.dtype | None, device: torch.device, kv_bytes: int) -> None:
        whole = load_whole(name, dtype, device)
        config = whole.config.get_text_config(decoder=True)
        if keeps_states(config):
            raise UnsupportedFeature(
                f"{DRAFT}{name} cannot draft: its layers keep states, which take no tokens back"
            )
        #: Number of tokens that it knows.
        self.vocabulary = int(config.vocab_size)
        #: What comes before its layers and after them.
        self.ends = EmbeddingAndHead(whole)
        layers = int(config.num_hidden_layers)
        part, stack = shared_copy(whole, range(layers))
        strip(part, stack.slots)
        tuning = pack_weights(part, stack)
        #: Runs its layers.
        self.runner = build_runner(stack, Split(layers, 0, layers), config, kv_bytes, tuning)
        if self.runner.unpacked_because is not None:
            raise UnsupportedFeature(
                f"{DRAFT}{name} cannot draft for many requests at once: {self.runner.unpacked_because}"
            )
        if not self.runner.divisible:
            raise UnsupportedFeature(f"{DRAFT}{name} cannot draft: its output depends on how the prompt is chunked")


def check_tokens(name: str, model: str, revision: str | None = None, tokenizer: Any = None) -> None:
    """Compares the tokens of a draft model and of a model. Those that were added to either may differ.

    Args:
        name: the directory or hub id of the draft model's checkpoint.
        model, revision: those of the model's.
        tokenizer: the one that is used with the model; None for the one beside it.

    Raises:
        ConfigError: their tokens differ, or one has no tokenizer.
        SplitError: a tokenizer cannot be read; as `load_tokenizer`.
    """
    target = tokenizer if tokenizer is not None else _tokenizer(model, revision)
    own = _tokenizer(name)
    for place, found in ((model, target), (name, own)):
        if found is None:
            raise ConfigError(f"{DRAFT}{name} cannot be compared with the model: there is no tokenizer of {place}")
    added = {*target.get_added_vocab(), *own.get_added_vocab()}
    if _other_tokens(target, added) != _other_tokens(own, added):
        raise ConfigError(f"{DRAFT}{name} has other tokens than {model}: a draft model needs the same tokenizer")


def _tokenizer(place: str, revision: str | None = None) -> Any:
    """The tokenizer of a checkpoint; None if there is none."""
    try:
        return load_tokenizer(place, revision)
    except UnknownModel:
        return None


def _other_tokens(tokenizer: Any, added: set[str]) -> dict[str, int]:
    """The ids of a tokenizer's tokens, without these."""
    return {token: number for token, number in tokenizer.get_vocab().items() if token not in added}

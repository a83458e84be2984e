"""Special tokens: those that mark turns and ends, and are no part of a text."""

from __future__ import annotations

from typing import Any


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokenizer's special tokens: how each is written, by its id."""
    added = {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {id_: token for id_, token in named if id_ is not None} | added

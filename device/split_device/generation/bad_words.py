"""Tokens that requests name: those of words that an answer must not contain, and ids."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from split_common.system.text import check_text
from split_device.models.language import check_tokens


@functools.lru_cache(maxsize=64)
def bad_word_tokens(tokenizer: Any, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The token ids of words as they stand at the beginning of a text, and behind a space.

    They are kept: a tokenizer may not be called by several threads at once, and a second call does not call it.

    Raises:
        ConfigError: a word is not UTF-8.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = check_text(word, "bad_words").lstrip(" ")
        for text in dict.fromkeys((word, " " + bare)):
            ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            # Some tokenizers put a space in front of each text, and write another one as a token of its own.
            if ids and ids not in found and not (text != word and ids[1:] in found):
                found[ids] = None
    return tuple(found)


def check_named_tokens(model: Any, *named: Iterable[Sequence[int]]) -> None:
    """Raises ConfigError if one of several collections of token ids names a token that the model does not have."""
    tokens = {token for sequences in named for sequence in sequences for token in sequence}
    if tokens:
        check_tokens(model, sorted(tokens))

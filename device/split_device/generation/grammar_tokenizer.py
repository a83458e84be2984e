"""A tokenizer as llguidance needs it: the bytes of all tokens, and how text is written in them."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
from llguidance import LLTokenizer, TokenizerWrapper

from split_common.errors import UnsupportedFeature
from split_device.generation.special_tokens import special_tokens
from split_device.generation.token_bytes import TokenBytes


class _Vocabulary:
    """What llguidance asks of a tokenizer, by the names that it has there. Text never becomes special tokens.

    Args:
        tokens: the bytes of all tokens; a special one's are how it is written.
        plain: llguidance's own tokenizer without special tokens; None for the longest tokens that fit.
    """

    def __init__(self, tokens: list[bytes], special: set[int], end: int, plain: LLTokenizer | None) -> None:
        self.tokens = tokens
        self.special_token_ids = sorted(special)
        self.eos_token_id = end
        self.bos_token_id = None
        self._plain = plain
        self._ids = {data: id_ for id_, data in enumerate(tokens) if data and id_ not in special}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        if self._plain is not None:
            found: list[int] = self._plain.tokenize_bytes(text)
            if b"".join(self.tokens[id_] for id_ in found) == text:
                return found
        return self._greedy(text)

    def _greedy(self, text: bytes) -> list[int]:
        """The longest tokens that fit; as far as there are any."""
        found: list[int] = []
        at = 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((size for size in sizes if text[at : at + size] in self._ids), 0)
            if not size:
                break
            found.append(self._ids[text[at : at + size]])
            at += size
        return found


def grammar_tokenizer(tokenizer: Any, vocabulary: int, ends: list[int]) -> LLTokenizer:
    """The tokenizer for grammars. Takes a second or two.

    Args:
        tokenizer: a tokenizer of transformers.
        vocabulary: the number of the model's logits.
        ends: ids of the tokens that end a text, at least one; the first is the one that a grammar ends with.

    Raises:
        UnsupportedFeature: the model has no token that ends a text.
    """
    if not ends:
        raise UnsupportedFeature("structured outputs: the model has no token that ends a text")
    special = {id_ for id_ in special_tokens(tokenizer) if id_ < vocabulary} | set(ends)
    text = _backend(tokenizer)
    try:
        whole = LLTokenizer(text, eos_token=ends, slices=[]) if text else None
        plain = LLTokenizer(_without_added(text), eos_token=ends, slices=[]) if text else None
    except ValueError:
        # Its decoder is none that llguidance knows.
        whole = plain = None
    known = min(vocabulary, len(tokenizer))
    if whole is not None:
        tokens = [whole.decode_bytes([id_]) for id_ in range(min(known, whole.vocab_size))]
        special |= {id_ for id_ in range(len(tokens)) if whole.is_special_token(id_)}
    else:
        tokens = _token_bytes(tokenizer, known, special)
    tokens += [b""] * (vocabulary - len(tokens))
    wrapped = TokenizerWrapper(_Vocabulary(tokens, special, ends[0], plain))
    return LLTokenizer(wrapped, n_vocab=vocabulary, eos_token=ends)


def _backend(tokenizer: Any) -> str | None:
    """A fast tokenizer as JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    backend = copy.copy(backend)
    backend.no_padding()
    backend.no_truncation()
    return str(backend.to_str())


def _without_added(text: str) -> str:
    """A tokenizer, in JSON, that makes ordinary tokens of how special tokens are written."""
    # Millions of entries, which are not decoded.
    parts = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    return msgspec.json.encode({**parts, "added_tokens": []}).decode()


def _token_bytes(tokenizer: Any, count: int, special: set[int]) -> list[bytes]:
    names = special_tokens(tokenizer)
    known = TokenBytes(tokenizer)
    before = next((id_ for id_ in range(count) if id_ not in special), None)
    return [
        names.get(id_, f"<{id_}>").encode() if id_ in special else known.of(id_, before)[1] for id_ in range(count)
    ]

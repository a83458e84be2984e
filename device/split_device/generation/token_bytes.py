"""The bytes of single tokens: a character may be several tokens, which have no text of their own."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

from split_device.generation.special_tokens import special_tokens

#: A piece of SentencePiece's tokenizers for a byte that no other piece has.
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The bytes by the printable characters for which byte-level BPE writes them, as in GPT-2."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


class TokenBytes:
    """The bytes of a tokenizer's tokens. Those of all tokens of a text, put together, are the text in UTF-8."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def of(self, token: int, previous: int | None) -> tuple[str, bytes]:
        """A token as it is written, and its bytes. Special tokens have none: they are not part of the text.

        Args:
            previous: the token before it in the text; None if it is the first one, from which some tokenizers drop
                a space.
        """
        if token in self._special:
            return self._special[token], b""
        data = self._bytes(token, previous)
        return data.decode(errors="replace"), data

    def _bytes(self, token: int, previous: int | None) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is not None and token not in self._added:
            if "ByteLevel" in self._decoders and all(char in _ALPHABET for char in piece):
                return bytes(_ALPHABET[char] for char in piece)
            if "ByteFallback" in self._decoders and (found := _BYTE.fullmatch(piece)):
                return bytes([int(found[1], 16)])
        before = self._decode([] if previous is None else [previous])
        both = self._decode([token] if previous is None else [previous, token])
        return (both[len(before) :] if both.startswith(before) else self._decode([token])).encode()

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""

    @cached_property
    def _special(self) -> dict[int, str]:
        return special_tokens(self._tokenizer)

    @cached_property
    def _added(self) -> set[int]:
        return set(self._tokenizer.added_tokens_decoder)

    @cached_property
    def _decoders(self) -> set[str]:
        """The kinds of decoders that make text of the tokenizer's pieces."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            byte_level = hasattr(self._tokenizer, "byte_decoder")
            return {"ByteLevel"} if byte_level else {"ByteFallback"}
        if backend.decoder is None:
            return set()
        return _kinds(json.loads(backend.decoder.__getstate__()))


def _kinds(decoder: dict[str, Any]) -> set[str]:
    return {decoder["type"]}.union(*(_kinds(each) for each in decoder.get("decoders", ())))

"""The bytes of tokens, put together, are the text, whatever the tokenizer makes its text of."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from split_device.generation.token_bytes import TokenBytes

TEXT = "Hello world, žluťoučký kůň 你好🦄 ok"


def byte_level() -> Any:
    vocabulary = {byte: id_ for id_, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["He"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [("H", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece() -> Any:
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Helowrd,abckůň你", "▁Hello", "▁world"]
    merges = [("▁", "H"), ("▁H", "e"), ("▁He", "l"), ("▁Hel", "l"), ("▁Hell", "o")]
    words += [left + right for left, right in merges[:-1]]
    tokenizer = Tokenizer(models.BPE({word: id_ for id_, word in enumerate(words)}, merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def metaspace() -> Any:
    words = ["<unk>", "▁", *sorted(set(TEXT) - {" "})]
    tokenizer = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first", split=False), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(params=[byte_level, sentencepiece, metaspace])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    tokenizer = request.param()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def pieces(tokenizer: Any, ids: list[int]) -> list[tuple[str, bytes]]:
    found = TokenBytes(tokenizer)
    return [found.of(token, previous) for previous, token in pairwise([None, *ids]) if token is not None]


def test_the_bytes_of_all_tokens_are_the_text(tokenizer: Any) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    assert b"".join(data for _, data in pieces(tokenizer, ids)) == TEXT.encode()
    assert any("\ufffd" in text for text, _ in pieces(tokenizer, ids)) == (tokenizer.vocab_size > 200)


def test_added_tokens_have_bytes_and_special_ones_have_none(tokenizer: Any) -> None:
    ids = tokenizer("He")["input_ids"] + tokenizer.convert_tokens_to_ids(["<think>", "<end>"])
    *_, added, special = pieces(tokenizer, ids)
    assert added == ("<think>", b"<think>")
    assert special == ("<end>", b"")


def test_ids_without_a_token(tokenizer: Any) -> None:
    assert pieces(tokenizer, [100_000]) == [("", b"")]

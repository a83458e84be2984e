"""Text from tokens as they come: no half character, no half stop string, and the same after an interruption."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from split_device.generation.detokenize import TextStream


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token for each byte."""
    vocabulary = {byte: id_ for id_, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """Words that begin with a space, and a token for each byte that has no other."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁world", "Hello", "!"]
    tokenizer = Tokenizer(models.BPE({word: id_ for id_, word in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")  # noqa: S106


def texts(tokenizer: Any, text: str, *stop: str) -> list[str]:
    stream = TextStream(tokenizer, stop)
    pushed = [stream.push(token) for token in tokenizer(text)["input_ids"]]
    return [piece for piece in (*pushed, stream.end()) if piece]


def test_characters_come_whole(tokenizer: Any) -> None:
    assert texts(tokenizer, "aé€😀!") == ["a", "é", "€", "😀", "!"]


def test_what_never_becomes_a_character_comes_at_the_end(tokenizer: Any) -> None:
    stream = TextStream(tokenizer)
    tokens = tokenizer("a€")["input_ids"][:-1]
    assert [stream.push(token) for token in tokens] == ["a", "", ""]
    assert stream.end() == tokenizer.decode(tokens)[1:] != ""


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ["END"], ["o", "n", "e", " "]),
        ("one EN two", ["END"], ["o", "n", "e", " ", "EN ", "t", "w", "o"]),
        ("aab", ["ab"], ["a"]),
        ("aa", ["aab"], ["aa"]),
        ("xyz", ["yz", "y"], ["x"]),
        ("a€b", ["€"], ["a"]),
        ("abc", [""], ["a", "b", "c"]),
    ],
)
def test_stop_texts(tokenizer: Any, text: str, stop: list[str], expected: list[str]) -> None:
    assert texts(tokenizer, text, *stop) == expected


def test_a_text_that_continues_another_one_keeps_its_space(sentencepiece: Any) -> None:
    hello, world = sentencepiece.convert_tokens_to_ids(["▁Hello", "▁world"])
    assert TextStream(sentencepiece).push(world) == "world"
    assert TextStream(sentencepiece, before=[hello]).push(world) == " world"


def test_it_goes_on_where_it_was(tokenizer: Any) -> None:
    text, stop = "a€ and STO, then STOP", ("STOP",)
    tokens = tokenizer(text)["input_ids"]
    whole = "".join(texts(tokenizer, text, *stop))
    for cut in range(len(tokens)):
        first, second = TextStream(tokenizer, stop), TextStream(tokenizer, stop)
        begun = "".join(first.push(token) for token in tokens[:cut])
        for token in tokens[:cut]:
            second.push(token)
        assert begun + "".join(second.push(token) for token in tokens[cut:]) + second.end() == whole
        assert second.stopped


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["▁Hello", "▁world", "!"], ["Hello", " world", "!"]),
        (["<s>", "▁Hello", "Hello", "</s>"], ["Hello", "Hello"]),
        (["▁Hello", "<0xE2>", "<0x82>", "<0xAC>", "!"], ["Hello", "€", "!"]),
        (["Hello", "<0xE2>", "▁world", "<0x82>"], ["Hello", "\ufffd world", "\ufffd"]),
        (["<0xF0>", "<0x9F>", "<0x41>", "!", "▁Hello"], ["\ufffd\ufffd\ufffd!", " Hello"]),
    ],
)
def test_spaces_before_words_special_tokens_and_single_bytes(
    sentencepiece: Any, tokens: list[str], expected: list[str]
) -> None:
    ids = sentencepiece.convert_tokens_to_ids(tokens)
    stream = TextStream(sentencepiece)
    pieces = [*map(stream.push, ids), stream.end()]
    assert [piece for piece in pieces if piece] == expected
    assert "".join(expected) == sentencepiece.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("tokens", "stop", "expected"),
    [
        (["▁Hello", "</s>", "▁world"], "</s>", ["Hello"]),
        (["▁Hello", "!", "</s>", "▁world"], "o!</s> w", ["Hell"]),
        (["▁Hello", "</s>", "!"], "</s>?", ["Hello", "!"]),
        (["</s>", "▁Hello", "</s>"], "s>He", []),
        (["▁Hello", "</s>", "<s>", "!"], "<s>!", ["Hello"]),
        (["▁Hello", "</s>", "<s>"], "</s><s>!", ["Hello"]),
        (["<0xE2>", "</s>", "!"], "</s>", []),
    ],
)
def test_a_stop_text_may_hold_special_tokens(
    sentencepiece: Any, tokens: list[str], stop: str, expected: list[str]
) -> None:
    stream = TextStream(sentencepiece, [stop])
    pushed = [*map(stream.push, sentencepiece.convert_tokens_to_ids(tokens)), stream.end()]
    assert [piece for piece in pushed if piece] == expected
    assert stream.stopped == (stop not in ("</s>?", "</s><s>!"))

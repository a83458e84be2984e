"""Text from tokens as they come: no half character, no half stop text, and the same after an interruption."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from split_device.jobs.text import TextStream


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token for each byte."""
    vocabulary = {byte: id_ for id_, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


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

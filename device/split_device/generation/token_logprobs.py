"""Log probabilities of tokens with the tokens' texts, for those who have no tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from split_device.generation.token_bytes import TokenBytes

if TYPE_CHECKING:
    # Commands that need no model import this module, and must not load torch.
    from split_device.generation.request import Logprobs


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """A token's id, text, bytes (`data`) and log probability, and those of the likeliest others. Jobs store it."""

    id: int
    text: str
    data: bytes
    #: None for the first token of a prompt, which nothing precedes.
    logprob: float | None
    #: How many tokens are as likely or likelier, itself included.
    rank: int | None = None
    top: tuple[TokenLogprobs, ...] = ()


class LogprobsWriter:
    """Gives the tokens of one text their texts, one after the other.

    Args:
        tokenizer: of transformers.
        previous: the token before the first one of the text; None if there is none.
    """

    def __init__(self, tokenizer: Any, previous: int | None = None) -> None:
        self._bytes = TokenBytes(tokenizer)
        self._previous = previous

    def next(self, token: int, found: Logprobs | None) -> TokenLogprobs:
        """The next token of the text."""
        previous, self._previous = self._previous, token
        text, data = self._bytes.of(token, previous)
        if found is None:
            return TokenLogprobs(token, text, data, None)
        top = tuple(
            TokenLogprobs(id_, *self._bytes.of(id_, previous), value, place + 1)
            for place, (id_, value) in enumerate(found.top)
        )
        return TokenLogprobs(token, text, data, found.chosen, found.rank, top)


def prompt_logprobs(tokenizer: Any, prompt: Sequence[int], found: Iterable[Logprobs | None]) -> list[TokenLogprobs]:
    """The tokens of a prompt with their log probabilities, of which the first token has none."""
    writer = LogprobsWriter(tokenizer)
    return [writer.next(token, each) for token, each in zip(prompt, found, strict=True)]

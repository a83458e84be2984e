"""What a language model is asked to do, unsplit and split, by token ids: the answers have to be the same tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.structures import FIRST_SPECIAL, SPECIAL

#: Token ids, a list for each sequence.
Tokens = list[list[int]]

#: Tokens of an answer, and of one of a conversation's or of many sessions' at once.
NEW_TOKENS = 12
FEW_NEW_TOKENS = 4

#: The token of which `REPLAYED` lets a worker die.
FATAL_TOKEN = 5

#: How many sessions `mixed` runs at once.
SESSIONS = 8


def prompt(tokens: int, seed: int = 0) -> torch.Tensor:
    """Token ids `[1, tokens]`, int64."""
    return torch.randint(3, FIRST_SPECIAL, (1, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    """Answers greedily, with `NEW_TOKENS` tokens unless the options say otherwise."""
    usual: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "max_new_tokens": NEW_TOKENS,
        "suppress_tokens": list(SPECIAL),
    }
    return model.generate(ids, **usual | options)


class Conversation:
    """A text whose cache is kept from turn to turn."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None
        self.text = torch.zeros(1, 0, dtype=torch.int64)

    def say(self, tokens: int) -> Conversation:
        """Goes on with a prompt of so many tokens, and the answer."""
        text = torch.cat([self.text, prompt(tokens, seed=self.text.shape[1])], 1)
        output = generate(
            self._model, text, cache=self._cache, max_new_tokens=FEW_NEW_TOKENS, return_dict_in_generate=True
        )
        self._cache, self.text = output.cache, output.sequences
        return self

    def fork(self) -> Conversation:
        """Another one that has begun as this one."""
        twin = Conversation(self._model)
        twin._cache, twin.text = copy.deepcopy(self._cache), self.text
        return twin

    def end(self) -> list[int]:
        """The text. Its cache is emptied, which ends the session."""
        self._cache.reset()
        return list(self.text[0].tolist())


def greedy(model: Any) -> Tokens:
    return tokens(generate(model, prompt(9)))


def padded(model: Any) -> Tokens:
    """Two prompts of which the shorter one is padded on its left."""
    ids = prompt(9).repeat(2, 1)
    ids[0, :4] = 0
    return tokens(generate(model, ids, attention_mask=(ids != 0).long()))


def beams(model: Any) -> Tokens:
    return tokens(generate(model, prompt(9), num_beams=4, num_return_sequences=2))


def repetitive(model: Any, **options: Any) -> Tokens:
    return tokens(generate(model, prompt(5).repeat(1, 3), **options))


def lookup(model: Any) -> Tokens:
    """Drafts are n-grams of a prompt that repeats itself; most are wrong, so that the cache is cropped."""
    return repetitive(model, prompt_lookup_num_tokens=4)


def assisted(model: Any, assistant: Any) -> Tokens:
    """Drafts of an assistant."""
    return tokens(generate(model, prompt(9), assistant_model=assistant))


def multi_turn(model: Any) -> Tokens:
    return [Conversation(model).say(9).say(5).say(1).end()]


def fork(model: Any) -> Tokens:
    """Three continuations of one beginning, of which two take turns."""
    first = Conversation(model).say(9)
    second, third = first.fork(), first.fork()
    first.say(2)
    second.say(7).say(3)
    return [each.end() for each in (first.say(4), second, third.say(1))]


def evicted(model: Any) -> Tokens:
    """The first of two conversations grows, and on a worker with little memory takes the second one's place."""
    first, second = Conversation(model).say(9), Conversation(model).say(7)
    ended = first.say(170).end()
    return [ended, second.say(5).end()]


def replayed(model: Any, kill: Callable[[], None] = lambda: None) -> Tokens:
    """Calls `kill` once, in the middle of an answer."""
    seen = 0

    def count(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == FATAL_TOKEN:
            kill()
        return scores

    return tokens(generate(model, prompt(9, seed=1), logits_processor=[count]))


def mixed(model: Any, at_once: int = 1) -> Tokens:
    """`SESSIONS` of several lengths, two of which search with beams, `at_once` of them at the same time."""

    def session(number: int) -> Tokens:
        ids = prompt(2 + 5 * number, seed=number)
        return tokens(generate(model, ids, num_beams=3 if number % 4 == 3 else 1, max_new_tokens=FEW_NEW_TOKENS))

    with ThreadPoolExecutor(at_once) as pool:
        return [each for session_ in pool.map(session, range(SESSIONS)) for each in session_]


def tokens(sequences: Iterable[torch.Tensor]) -> Tokens:
    return [each.tolist() for each in sequences]

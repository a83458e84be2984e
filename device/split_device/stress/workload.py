"""Random text requests, drawn from a seed: prompts and decoding strategies."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

#: Fewest and most tokens of a prompt, and of an answer.
PROMPT = 4, 64
ANSWER = 8, 40


@dataclass(frozen=True)
class GenerateArguments:
    """Arguments of `generate`; `prompt` is `[rows, tokens]`, int64, padded on the left."""

    prompt: torch.Tensor
    options: dict[str, Any]

    def run(self, model: Any) -> torch.Tensor:
        """The generated tokens, `[sequences, tokens]`."""
        output: torch.Tensor = model.generate(self.prompt, do_sample=False, pad_token_id=0, **self.options)
        return output[:, self.prompt.shape[1] :]


def draw(seed: int, device: int, number: int, vocabulary: int) -> GenerateArguments:
    """The `number`-th request of a device."""
    rng = random.Random(f"{seed} {device} {number}")
    way = rng.choice(_WAYS)
    return way(rng, vocabulary, {"max_new_tokens": rng.randint(*ANSWER)})


def _greedy(rng: random.Random, vocabulary: int, options: dict[str, Any]) -> GenerateArguments:
    prompt = _tokens(rng, vocabulary)
    return GenerateArguments(prompt, {"attention_mask": torch.ones_like(prompt), **options})


def _batch(rng: random.Random, vocabulary: int, options: dict[str, Any]) -> GenerateArguments:
    rows = [_tokens(rng, vocabulary)[0] for _ in range(rng.randint(2, 4))]
    longest = max(map(len, rows))
    prompt = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    return GenerateArguments(prompt, {"attention_mask": (prompt != 0).long(), **options})


def _beams(rng: random.Random, vocabulary: int, options: dict[str, Any]) -> GenerateArguments:
    return _greedy(rng, vocabulary, {"num_beams": 3, "num_return_sequences": 2, **options})


def _lookup(rng: random.Random, vocabulary: int, options: dict[str, Any]) -> GenerateArguments:
    """Prompt lookup, which rolls the cache back. The prompt repeats itself, so that there are matches."""
    once = _tokens(rng, vocabulary)
    prompt = torch.cat([once, once], 1)
    return GenerateArguments(
        prompt, {"attention_mask": torch.ones_like(prompt), "prompt_lookup_num_tokens": 4, **options}
    )


#: The strategies that `draw` chooses from, with repetition as weight.
_WAYS: list[Callable[[random.Random, int, dict[str, Any]], GenerateArguments]] = [
    _greedy,
    _greedy,
    _batch,
    _beams,
    _lookup,
]


def _tokens(rng: random.Random, vocabulary: int) -> torch.Tensor:
    """A random prompt `[1, tokens]` without the padding token, 0."""
    return torch.tensor([[rng.randrange(1, vocabulary) for _ in range(rng.randint(*PROMPT))]])

"""What the model expected after the same token before.

Token Recycling (arXiv 2408.08696) keeps the model's last top tokens after each token. Here they are averages, with
probabilities. What the model expects after any token at all comes second: for a token new to the text, it is
better than nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch

#: Number of tokens that are kept as successors of a token, and of any token.
SUCCESSORS = 16
COMMON = 48

#: Most tokens whose successors are kept; those seen longest ago make room. Each takes about 2 KiB.
MOST_TOKENS = 16_384

#: What earlier expectations count beside a new one: after the same token, and after any token.
FADING = 0.5
FADING_OF_COMMON = 0.97

#: The share of what was expected after the same token. The rest is what is expected after any token.
SHARE = 0.4


class Successors:
    """The tokens that a model expects after each token, for all requests of a generator. Not thread-safe.

    Args:
        most_tokens: most tokens whose successors are kept.
    """

    def __init__(self, most_tokens: int = MOST_TOKENS) -> None:
        self._most_tokens = most_tokens
        self._after: OrderedDict[int, dict[int, float]] = OrderedDict()
        self._common: dict[int, float] = {}

    def __len__(self) -> int:
        """Number of tokens whose successors are kept."""
        return len(self._after)

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        """Takes what the model expects after each of some tokens: float32 `[tokens, vocabulary]`."""
        top = logits.topk(min(SUCCESSORS, logits.shape[-1]), dim=-1)
        # As softmax does, in fewer passes over the vocabulary.
        best = top.values[:, :1]
        chances = ((top.values - best).exp() / (logits - best).exp_().sum(-1, keepdim=True)).tolist()
        for token, ids, row in zip(tokens, top.indices.tolist(), chances, strict=True):
            new = {each: chance for each, chance in zip(ids, row, strict=True) if chance > 0}
            self._after[token] = _average(self._after.get(token), new, FADING, SUCCESSORS)
            self._after.move_to_end(token)
            if len(self._after) > self._most_tokens:
                self._after.popitem(last=False)
            self._common = _average(self._common, new, FADING_OF_COMMON, COMMON)

    def expected(self, token: int) -> dict[int, float]:
        """Tokens that may come after a token, with their chances."""
        after = self._after.get(token)
        if after is None:
            return dict(self._common)
        chances = {each: (1 - SHARE) * chance for each, chance in self._common.items()}
        for each, chance in after.items():
            chances[each] = chances.get(each, 0.0) + SHARE * chance
        return chances


class RecyclePredictor:
    """Expects what the model expected after the latest token before. A `Predictor`; a state is that token.

    Args:
        successors: what all requests of a generator have learned together.
    """

    def __init__(self, successors: Successors) -> None:
        self._successors = successors
        self._latest = -1

    def extend(self, tokens: Sequence[int]) -> None:
        if tokens:
            self._latest = tokens[-1]

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        self._successors.learn(tokens, logits)

    def end(self) -> int:
        return self._latest

    def after(self, state: int, token: int) -> int:
        return token

    def expected(self, state: int) -> dict[int, float]:
        return self._successors.expected(state)


def _average(old: Mapping[int, float] | None, new: dict[int, float], fading: float, size: int) -> dict[int, float]:
    if not old:
        return new
    average = {token: fading * chance for token, chance in old.items()}
    for token, chance in new.items():
        average[token] = average.get(token, 0.0) + (1 - fading) * chance
    if len(average) <= size:
        return average
    return dict(sorted(average.items(), key=lambda each: -each[1])[:size])

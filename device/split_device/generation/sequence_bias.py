"""Biases of sequences of tokens, and of tokens, at a cost that hardly grows with how many sequences there are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import LogitsProcessor, SequenceBiasLogitsProcessor


class _Biased(NamedTuple):
    """A token behind others, and what is added to its logit there."""

    before: list[int]
    token: int
    bias: float


class SequenceBias(LogitsProcessor):  # type: ignore[misc]
    """Adds what transformers' processor adds, bit by bit, for a batch of one.

    That one compares all sequences with the text at every token, once for each length. Here only those are compared
    that have the text's last token in the place before their last.

    Args:
        processor: the one that `generate` would use, for `sequence_bias` or `bad_words_ids`.
    """

    def __init__(self, processor: SequenceBiasLogitsProcessor) -> None:
        biases: dict[tuple[int, ...], float] = processor.sequence_bias
        self._single = {sequence[0]: bias for sequence, bias in biases.items() if len(sequence) == 1}
        #: Biases of tokens by themselves, float32 `[vocabulary]`; empty until it is needed.
        self._everywhere = torch.empty(0)
        # In transformers' order, which is that of a sum.
        lengths = list(dict.fromkeys(map(len, biases)))
        longer = sorted((each for each in biases if len(each) > 1), key=lambda each: lengths.index(len(each)))
        self._most = max(lengths) - 1
        self._by_last: dict[int, list[_Biased]] = {}
        for sequence in longer:
            *before, token = sequence
            self._by_last.setdefault(before[-1], []).append(_Biased(before, token, biases[sequence]))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(self._everywhere) != scores.shape[1]:
            self._everywhere = torch.zeros(scores.shape[1])
            self._everywhere[[*self._single]] = torch.tensor([*self._single.values()])
        found = self._found(input_ids)
        if not found:
            return scores + self._everywhere
        tokens = torch.tensor([each.token for each in found])
        biases = torch.tensor([each.bias for each in found])
        return scores + self._everywhere.index_add(0, tokens, biases)

    def _found(self, ids: torch.Tensor) -> list[_Biased]:
        """The sequences that the text ends with, but for their last tokens."""
        candidates = self._by_last.get(int(ids[0, -1]))
        if not candidates:
            return []
        text = ids[0, -self._most :].tolist()
        return [each for each in candidates if each.before == text[-len(each.before) :]]

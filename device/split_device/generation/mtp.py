"""MTP layers: the checkpoint's own layers that draft for all requests of a generator.

They see what the model has computed of a text, its last hidden states, and so guess better than a small model. Only
the first one of several is run: its own output takes the place of the model's state for each further token of a
draft, as in vLLM, and in the work of DeepSeek-V3 (arXiv 2412.19437).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from split_common.engine.runner import build_runner
from split_common.engine.sequences import KVSequence
from split_common.errors import UnsupportedFeature
from split_common.models.split import Split
from split_device.generation.loaded_drafts import DraftSequence, LoadedDrafts
from split_device.generation.local_layers import LocalLayers, pack_weights
from split_device.generation.mtp_layer import load_mtp
from split_device.speculation.names import MTP

#: Most tokens of a text whose states wait to be read, the last ones.
MOST_STATES = 4096


class MtpSequence(DraftSequence):
    """What is kept of one request: keys and values of the MTP layer, one for each token that a state came before.

    A token is read with the model's state of the token before it. Those that were drafted are read with the layer's
    own output in its place, and so are cut off the cache again.
    """

    def __init__(self, cache: KVSequence, cost: int, most_tokens: int) -> None:
        super().__init__(cache, cost, most_tokens)
        #: The model's states `[tokens, width]`, of steps of which it is not known yet what follows.
        self._computed: list[torch.Tensor] = []
        #: Tokens that were not read, and the states of those before them, in pieces `[tokens, width]`.
        self._tokens: list[int] = []
        self._pieces: deque[torch.Tensor] = deque()
        self._drafted = 0
        #: Stands for the state of the last token that was read, `[width]`.
        self.output: torch.Tensor | None = None

    def computed(self, states: torch.Tensor) -> None:
        # They are a part of what one forward made for all requests.
        self._computed.append(states[-MOST_STATES:].clone())
        while sum(map(len, self._computed[1:])) >= MOST_STATES:
            del self._computed[0]

    def chosen(self, wrong: int, entering: int) -> None:
        if not self._computed:
            return
        pieces, self._computed = self._computed, []
        text = self.predictor.text
        end = len(text) - entering + 1
        right = sum(map(len, pieces)) - wrong
        count = min(right, end)
        if count <= 0:
            return
        # Copies, or else they would hold the memory of those that were wrong.
        self._pieces += [piece.clone() for piece in _cut(pieces, right - count, right)]
        self._tokens += text[end - count : end]
        if (dropped := len(self._tokens) - MOST_STATES) > 0:
            self._drop(dropped)
            self._sure = self._drafted = 0
            self.cache.truncate(0)

    def unread(self) -> list[int]:
        if self._drafted:
            self._drafted = 0
            self.cache.truncate(self._sure)
        return self._tokens

    @property
    def held(self) -> int:
        return self._sure + self._drafted

    def positions(self, tokens: Sequence[int]) -> range:
        return range(self.held, self.held + len(tokens))

    def states(self, count: int) -> torch.Tensor | None:
        """The model's states `[count, width]` before the tokens that come next; None if these were drafted."""
        if not self._pieces:
            return None
        return torch.cat(_cut(self._pieces, 0, count))

    def holds(self, tokens: Sequence[int], outputs: torch.Tensor) -> None:
        if self._pieces:
            self._sure += len(tokens)
            self._drop(len(tokens))
        else:
            self._drafted += len(tokens)
        self.output = outputs[-1]

    def _drop(self, count: int) -> None:
        """Forgets the first tokens that were not read, and the states before them."""
        self._tokens = self._tokens[count:]
        while count > 0:
            piece = self._pieces.popleft()
            if len(piece) > count:
                self._pieces.appendleft(piece[count:])
            count -= len(piece)

    def can_begin(self, tokens: int) -> bool:
        return tokens == 1

    def repeat_last(self) -> list[int]:
        return []


def _cut(pieces: Iterable[torch.Tensor], begin: int, end: int) -> list[torch.Tensor]:
    """The rows from index `begin` to `end` of what is in pieces `[rows, width]`, in pieces."""
    cut, at = [], 0
    for piece in pieces:
        if at >= end:
            break
        if at + len(piece) > begin:
            cut.append(piece[max(0, begin - at) : end - at])
        at += len(piece)
    return cut


class MtpDrafts(LoadedDrafts[MtpSequence]):
    """Drafts by the first MTP layer of a split model's checkpoint.

    Args:
        model: the split model.
        layers: its head and tail.
        kv_bytes: memory for the layer's keys and values.

    Raises:
        UnsupportedFeature: there is none that can draft; the message has the reason.
        SplitError: it cannot be loaded; as `load_mtp`, and ModelError if the memory holds no page of tokens.
    """

    def __init__(self, model: Any, layers: LocalLayers, kv_bytes: int) -> None:
        device = next(model.parameters()).device
        self._ends, self._layer = (
            layers.ends,
            load_mtp(str(model.name_or_path), model.revision, model.dtype, device),
        )
        slots = int(self._layer.config.num_hidden_layers)
        tuning = pack_weights(self._layer.part, self._layer.stack)
        runner = build_runner(self._layer.stack, Split(slots, 0, 1), self._layer.config, kv_bytes, tuning)
        if runner.unpacked_because is not None:
            raise UnsupportedFeature(f"{MTP} cannot draft for many requests at once: {runner.unpacked_because}")
        if not runner.divisible:
            raise UnsupportedFeature(f"{MTP} cannot draft: its output depends on how the prompt is chunked")
        super().__init__("the MTP layer", runner, layers.vocabulary, layers.vocabulary)

    def _sequence(self, cache: KVSequence, cost: int, most_tokens: int) -> MtpSequence:
        return MtpSequence(cache, cost, most_tokens)

    def _inputs(self, parts: Sequence[tuple[MtpSequence, list[int]]]) -> torch.Tensor:
        tokens = [token for _, part in parts for token in part]
        positions = [position for sequence, part in parts for position in sequence.positions(part)]
        embeddings = self._ends.embed(tokens, positions, [None] * len(tokens))
        return self._layer.project(embeddings, torch.cat([self._states(*part) for part in parts])).cpu()

    def _states(self, sequence: MtpSequence, tokens: list[int]) -> torch.Tensor:
        """The states `[tokens, width]` of the tokens before these, as the model's head takes them."""
        if (states := sequence.states(len(tokens))) is not None:
            return self._ends.last_states(states)
        assert sequence.output is not None
        return self._layer.normed(sequence.output[None])

    def _logits(self, outputs: torch.Tensor) -> torch.Tensor:
        return self._ends.head(self._layer.normed(outputs)).cpu()

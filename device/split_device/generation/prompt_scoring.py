"""Log probabilities of prompts' own tokens, computed in pieces between the steps of other requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from split_common.engine.lora import AdapterNumber
from split_device.generation.active import ActiveRequest
from split_device.generation.logprobs import logprobs_of

#: Most float32 logits that are computed at once: 32 MiB.
MAX_LOGITS = 2**23

#: Logits `[rows, vocabulary]` of states `[rows, width]`, with an adapter for each row.
ToLogits = Callable[[torch.Tensor, Sequence[AdapterNumber]], torch.Tensor]


@dataclass
class _Prompt:
    request: ActiveRequest
    #: The tail's outputs `[prompt tokens, width]`.
    states: torch.Tensor


class PromptScorer:
    """Prompts whose tokens are scored before their answers begin. The generator's thread uses it.

    Args:
        logits: computes logits of states.
        vocabulary: number of logits of one token.
    """

    def __init__(self, logits: ToLogits, vocabulary: int) -> None:
        self._logits = logits
        self._rows = max(1, MAX_LOGITS // vocabulary)
        self._prompts: deque[_Prompt] = deque()

    @property
    def idle(self) -> bool:
        return not self._prompts

    def add(self, request: ActiveRequest, states: torch.Tensor) -> bool:
        """Takes in a prompt if its tokens are to be scored; false if they are not, or have been.

        Args:
            states: outputs of the tail `[tokens, width]`, of the prompt and perhaps of tokens behind it.
        """
        generation = request.generation
        prompt = generation.request.prompt
        if generation.request.prompt_logprobs is None or len(generation.prompt_logprobs) == len(prompt):
            return False
        generation.prompt_logprobs[:] = [None]
        self._prompts.append(_Prompt(request, states))
        return True

    def run(self) -> tuple[ActiveRequest, torch.Tensor] | None:
        """Scores tokens of the prompt that came first, in one forward.

        Returns:
            The request and its state `[width]` of which the next token is chosen, if its prompt is complete.
        """
        while self._prompts and self._prompts[0].request.ended:
            self._prompts.popleft()
        if not self._prompts:
            return None
        request, states = self._prompts[0].request, self._prompts[0].states
        asked, found = request.generation.request, request.generation.prompt_logprobs
        # The state before a token says what that token should be.
        tokens = asked.prompt[len(found) : len(found) + self._rows]
        if tokens:
            rows = states[len(found) - 1 :][: len(tokens)]
            logits = self._logits(rows, [request.adapter] * len(tokens))
            found.extend(logprobs_of(logits, tokens, [asked.prompt_logprobs or 0] * len(tokens)))
        if len(found) < len(asked.prompt):
            return None
        self._prompts.popleft()
        return request, states[-1]

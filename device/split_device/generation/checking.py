"""Chooses the next tokens of many requests, and checks their drafts by that.

A step carries the last tokens of a text and a draft of what may follow: one continuation, or several (a tree). Each
token of the text is chosen as if there were no draft: by what followed the tokens before it, with the state of the
sampler after them. If the draft has the same token in its place, what followed that token is there already. So no
draft changes a token.

The idea is that of "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192), whose rule keeps
the distribution of tokens. Comparing with what the request's own random generator draws keeps the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from split_device.generation.active import ActiveRequest
from split_device.generation.choosing import Choice, choose_tokens
from split_device.generation.forced_tokens import accept_token
from split_device.generation.local_layers import LocalLayers
from split_device.generation.turn_time import TurnTime

#: Most float32 logits that are computed at once, unless they are of one request: 128 MiB.
MAX_LOGITS = 2**25

#: A request, and outputs of the tail `[1 + draft, width]`: that of which its next token is chosen, and those of its
#: draft.
Ready = tuple[ActiveRequest, torch.Tensor]


@dataclass(eq=False)
class Checked:
    """What came of a request's step."""

    request: ActiveRequest
    #: Logits `[1 + draft, vocabulary]`, and the index of the first one among those of all requests.
    logits: torch.Tensor
    first: int
    #: The tokens that were chosen or forced.
    tokens: list[int] = field(default_factory=list)
    #: Those that the draft had, the first ones: their indices in it.
    path: list[int] = field(default_factory=list)
    #: Why the request cannot go on.
    error: Exception | None = None

    @property
    def matched(self) -> int:
        """How many of the tokens the draft had."""
        return len(self.path)

    @property
    def row(self) -> int:
        """The index of the logits of which the next token is chosen, among those of all requests."""
        return self.first + 1 + self.path[-1] if self.path else self.first

    @property
    def goes_on(self) -> bool:
        """Whether another token can be chosen without another step."""
        if self.error is not None or self.matched < len(self.tokens):
            return False
        return self.request.sampler.finish_reason(self.request.generation.tokens) is None

    def may_go_on(self, turn: TurnTime) -> bool:
        """Whether another token can be chosen in this turn. If there is no time, the next step computes the last
        token again, as if the draft had not had it."""
        if not self.goes_on:
            return False
        if self.request.generation.request.constraint is None:
            return True
        if turn.over:
            self.path.pop()
            return False
        self.request.sampler.prepare()
        return True

    def accept(self, choice: Choice, turn: TurnTime) -> None:
        """Goes on with the next token, and those that it forces as far as there is time."""
        if isinstance(choice, Exception):
            self.error = choice
            return
        try:
            self.tokens += accept_token(self.request.sampler, self.request.generation, turn, *choice)
        except Exception as error:
            self.error = error
        while self.matched < len(self.tokens):
            child = self._child(self.path[-1] if self.path else -1, self.tokens[self.matched])
            if child is None:
                break
            self.path.append(child)

    def _child(self, node: int, token: int) -> int | None:
        """The index of a token of the draft that follows another one, or the text; None if the draft has it not."""
        drafts, parents = self.request.drafts, self.request.parents
        begun = len(parents) - len(drafts)
        for each in range(node + 1, len(drafts)):
            follows = parents[begun + each] == begun + node if parents else each == node + 1
            if follows and drafts[each] == token:
                return each
        return None


def prepare(ready: Sequence[Ready]) -> tuple[list[Ready], list[Ready]]:
    """Finds out what constraints allow next, as far as there is time.

    Returns:
        Requests whose next tokens can be chosen, at least one, and those that wait, so that many slow grammars do
        not hold up the others.
    """
    prepared: list[Ready] = []
    waiting: list[Ready] = []
    late = False
    with TurnTime() as turn:
        for request, states in ready:
            if late and request.generation.request.constraint is not None:
                waiting.append((request, states))
                continue
            prepared.append((request, states))
            late |= request.sampler.prepare() and turn.over
    return prepared, waiting


def check_drafts(layers: LocalLayers, ready: Sequence[Ready]) -> Iterator[Checked]:
    """Chooses at least one token for each request, which are then in its text. An error concerns one request."""
    turn = TurnTime()
    for part in _parts(ready, max(1, MAX_LOGITS // layers.vocabulary)):
        yield from _check(layers, part, turn)


def _parts(ready: Sequence[Ready], limit: int) -> Iterator[list[Ready]]:
    """Divides requests so that each part has at most `limit` states, or is one request."""
    part: list[Ready] = []
    for request, states in ready:
        if part and sum(len(others) for _, others in part) + len(states) > limit:
            yield part
            part = []
        part.append((request, states))
    if part:
        yield part


def _check(layers: LocalLayers, ready: Sequence[Ready], turn: TurnTime) -> list[Checked]:
    adapters = [request.adapter for request, states in ready for _ in states]
    logits = layers.logits(torch.cat([states for _, states in ready]), adapters)
    every: list[Checked] = []
    first = 0
    for request, states in ready:
        every.append(Checked(request, logits[first : first + len(states)], first))
        first += len(states)
    going = every
    while going:
        rows = [each.row for each in going]
        chosen_of = logits if len(rows) == len(logits) else logits[rows]
        choices = choose_tokens([each.request.sampler for each in going], chosen_of)
        with turn:
            for each, choice in zip(going, choices, strict=True):
                each.accept(choice, turn)
            going = [each for each in going if each.may_go_on(turn)]
    return every

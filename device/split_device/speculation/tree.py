"""Drafts from what may follow a text: chains of tokens, and trees of several continuations."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from split_common.engine.trees import is_chain

#: A chain ends before a token that is reached with a smaller chance than this.
LEAST_CHANCE = 0.05

State = TypeVar("State")


class Predictor(Protocol[State]):
    """Expects tokens, after a text and after guesses at its continuation. Not thread-safe.

    A `State` says where in a continuation one is. It is valid until the text grows.
    """

    def extend(self, tokens: Sequence[int]) -> None:
        """As `Drafter.extend`."""

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        """As `Drafter.learn`."""

    def end(self) -> State:
        """The end of the text."""

    def after(self, state: State, token: int) -> State:
        """Where one is after one more token."""

    def expected(self, state: State) -> dict[int, float]:
        """Tokens that may come next, with their chances, of which the sum is at most 1."""


@dataclass
class DraftTree:
    """Several continuations of a text, whose common beginnings are there once."""

    tokens: list[int] = field(default_factory=list)
    #: For each token, the index of the one before it; -1 if it follows the text. It is smaller than its own index.
    parents: list[int] = field(default_factory=list)
    #: The chance of each token that it follows, with all before it.
    chances: list[float] = field(default_factory=list)

    def first(self, count: int) -> DraftTree:
        """Its first tokens, which are a tree as well."""
        return DraftTree(self.tokens[:count], self.parents[:count], self.chances[:count])

    def after(self, begun: int) -> list[int]:
        """The parents of all tokens of a step, which begins with `begun` others; none if the step is a chain."""
        if is_chain(self.parents):
            return []
        return [*range(-1, begun - 1), *(parent + begun for parent in self.parents)]

    def matched(self, following: Sequence[int]) -> int:
        """How many of the tokens that really follow the text are a path of the tree, beginning with the first."""
        children = {edge: node for node, edge in enumerate(zip(self.parents, self.tokens, strict=True))}
        node = -1
        for length, token in enumerate(following):
            if (child := children.get((node, token))) is None:
                return length
            node = child
        return len(following)


class PredictedDrafter(Generic[State]):
    """Drafts what a predictor expects. A `Drafter`."""

    def __init__(self, predictor: Predictor[State]) -> None:
        self._predictor = predictor
        self.extend = predictor.extend
        self.learn = predictor.learn

    def draft(self, limit: int) -> list[int]:
        """The likeliest token, the likeliest one after it, and so on, while that has a chance of `LEAST_CHANCE`."""
        draft: list[int] = []
        state, chance = self._predictor.end(), 1.0
        while len(draft) < limit:
            token, share = max(self._predictor.expected(state).items(), key=lambda each: each[1], default=(-1, 0.0))
            chance *= share
            if chance < LEAST_CHANCE:
                break
            draft.append(token)
            state = self._predictor.after(state, token)
        return draft

    def draft_tree(self, budget: int) -> DraftTree:
        """The at most `budget` tokens that are reached with the largest chances.

        No other tree of as many tokens has more of the text on average, if the chances are right.
        """
        tree = DraftTree()
        # The likeliest child of each node that is not in the tree: its negated chance, a number that settles draws,
        # the node, its state and chance, its children by their chances, and the index among these.
        candidates: list[tuple[float, int, int, State, float, list[tuple[int, float]], int]] = []
        numbers = itertools.count()

        def push(node: int, state: State, chance: float, children: list[tuple[int, float]], index: int) -> None:
            if index < len(children):
                first = -chance * children[index][1]
                heapq.heappush(candidates, (first, next(numbers), node, state, chance, children, index))

        def expand(node: int, state: State, chance: float) -> None:
            children = sorted(self._predictor.expected(state).items(), key=lambda each: -each[1])
            push(node, state, chance, children, 0)

        expand(-1, self._predictor.end(), 1.0)
        while candidates and len(tree.tokens) < budget:
            negated, _, parent, state, chance, children, index = heapq.heappop(candidates)
            token = children[index][0]
            tree.tokens.append(token)
            tree.parents.append(parent)
            tree.chances.append(-negated)
            push(parent, state, chance, children, index + 1)
            expand(len(tree.tokens) - 1, self._predictor.after(state, token), -negated)
        return tree

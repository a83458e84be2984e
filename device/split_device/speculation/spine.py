"""What a model expects along its own likeliest continuation of a text, which was computed before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from split_device.speculation.tree import PredictedDrafter

#: Where one is after a token that is not the likeliest one: nothing is known of what follows.
ASIDE = -1


class SpinePredictor:
    """Expects what a draft model does. A `Predictor`; a state is how many tokens of the continuation came.

    The model runs once for each token of the continuation, so it is run for many requests at once, before drafts
    are made: `expect` takes what came of it.
    """

    def __init__(self) -> None:
        #: All tokens of the text.
        self.text: list[int] = []
        #: The likeliest tokens after it, in order.
        self.spine: list[int] = []
        self._chances: list[dict[int, float]] = []

    def extend(self, tokens: Sequence[int]) -> None:
        self.text += tokens
        self.forget()

    def forget(self) -> None:
        """Expects nothing until `expect` is called."""
        self.spine, self._chances = [], []

    def expect(self, chances: Mapping[int, float]) -> float:
        """Takes tokens that may come next on the continuation, with their chances.

        Returns:
            The chance of the likeliest one, which is then the continuation's next token.
        """
        token = max(chances, key=chances.__getitem__)
        self.spine.append(token)
        self._chances.append(dict(chances))
        return chances[token]

    def shorten(self) -> None:
        """Takes back the continuation's last token, unless it is the only one."""
        if len(self.spine) > 1:
            self.spine.pop()
            self._chances.pop()

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        """Does nothing: the draft model has learned before."""

    def end(self) -> int:
        return 0

    def after(self, state: int, token: int) -> int:
        return state + 1 if 0 <= state < len(self.spine) and token == self.spine[state] else ASIDE

    def expected(self, state: int) -> dict[int, float]:
        return self._chances[state] if 0 <= state < len(self._chances) else {}


class SpineDrafter(PredictedDrafter[int]):
    """Drafts what was computed of a draft model's continuation. A `Drafter`.

    Its first token is drafted however unlikely it is: that it is wrong is what shows that drafts do not pay.
    """

    def __init__(self, predictor: SpinePredictor) -> None:
        super().__init__(predictor)
        self._spine = predictor

    def draft(self, limit: int) -> list[int]:
        return self._spine.spine[:limit]

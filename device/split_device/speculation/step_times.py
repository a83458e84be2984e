"""How long steps take, by the number of tokens in them: what decides whether drafts pay."""

from __future__ import annotations

import numpy as np

#: What one cycle of steps counts after the next one. Half of what is known is from the latest 50 cycles.
FADING = 0.986

#: Before anything is known: what each token adds to a cycle, and what the second one of any step adds to that, as
#: shares of the cycle's time.
TOKEN_SHARE = 0.02
SEVERAL_SHARE = 0.0

#: How much the shares above count, in cycles that differ by one token.
PRIOR_WEIGHT = np.array([1e-6, 0.5, 2.0])

#: Cycles that are not looked at: the first ones load what later ones find loaded.
WARM_UP = 2.0

#: Cycles after which the fit is made anew.
FIT_EVERY = 0.5

#: Longest time that is believed, as a multiple of what was expected: a lost worker says nothing about drafts.
BELIEVED = 3.0


class StepTimes:
    """The duration of a cycle, from one choice of tokens to the next one, as a function of the tokens under way.

    It is a sum of three: a part that is always there (the round trip, reading the weights), a part that is there
    once any step has several tokens (other kernels), and a part for each token. They are fitted by least squares,
    to recent cycles more than to older ones: so they follow the machine and its load. Not thread-safe.
    """

    def __init__(self) -> None:
        #: Sums over cycles, each with its weight: products of `_features`, and of these with the seconds.
        self._products = [[0.0] * 3 for _ in range(3)]
        self._seconds = [0.0] * 3
        self._warmed_up = 0.0
        self._fit: tuple[float, float, float] | None = None
        #: Cycles since the fit.
        self._unfitted = 0.0
        #: How many recent cycles had no drafts.
        self.undrafted = 0.0
        #: Most tokens beyond one for each request that recent cycles had.
        self.widest = 0.0

    def observe(self, rows: int, tokens: int, drafted: bool, seconds: float, weight: float) -> None:
        """Learns from a cycle.

        Args:
            rows: number of requests whose steps were under way.
            tokens: number of tokens in these steps.
            drafted: whether some of these tokens were drafts.
            seconds: how long it took.
            weight: the share of the cycle that is told of; those of all its requests add up to 1.
        """
        if self._warmed_up < WARM_UP:
            self._warmed_up += weight
            return
        if (expected := self.seconds(rows, tokens)) is not None:
            seconds = min(seconds, BELIEVED * expected)
        fade = FADING**weight
        features = _features(rows, tokens)
        for row, one in zip(self._products, features, strict=True):
            for column, other in enumerate(features):
                row[column] = fade * row[column] + weight * one * other
        self._seconds = [
            fade * total + weight * one * seconds for total, one in zip(self._seconds, features, strict=True)
        ]
        self.undrafted = fade * self.undrafted + weight * (not drafted)
        self.widest = max(float(tokens - rows), fade * self.widest)
        self._unfitted += weight

    def seconds(self, rows: int, tokens: int) -> float | None:
        """How long a cycle with these steps will take; None if no cycle was seen."""
        if (weight := self._products[0][0]) == 0:
            return None
        mean = self._seconds[0] / weight
        if self._fit is None or self._unfitted >= FIT_EVERY:
            prior = PRIOR_WEIGHT * np.array([0.0, SEVERAL_SHARE * mean, TOKEN_SHARE * mean])
            fitted = np.linalg.solve(
                np.array(self._products) + np.diag(PRIOR_WEIGHT), np.array(self._seconds) + prior
            )
            always, several, token = fitted.tolist()
            # More tokens make no cycle shorter, whatever a few noisy ones say.
            self._fit = always, max(0.0, several), max(0.0, token)
            self._unfitted = 0.0
        always, several, token = self._fit
        return max(0.1 * mean, always + several * (tokens > rows) + token * tokens)


def _features(rows: int, tokens: int) -> tuple[float, float, float]:
    return 1.0, float(tokens > rows), float(tokens)

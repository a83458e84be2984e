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

#: Longest time that is believed, as a multiple of what was expected: a lost worker says nothing about drafts.
BELIEVED = 3.0


class StepTimes:
    """The duration of a cycle, from one choice of tokens to the next one, as a function of the tokens under way.

    It is a sum of three: a part that is always there (the round trip, reading the weights), a part that is there
    once any step has several tokens (other kernels), and a part for each token. They are fitted by least squares,
    to recent cycles more than to older ones: so they follow the machine and its load. Not thread-safe.
    """

    def __init__(self) -> None:
        self._products = np.zeros((3, 3))
        self._sums = np.zeros(3)
        self._time = 0.0
        self._weight = 0.0
        self._warmed_up = 0.0
        self._fit: np.ndarray | None = None
        #: How many recent cycles had no drafts.
        self.undrafted = 0.0

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
        self._products = fade * self._products + weight * np.outer(features, features)
        self._sums = fade * self._sums + weight * seconds * features
        self._time = fade * self._time + weight * seconds
        self._weight = fade * self._weight + weight
        self.undrafted = fade * self.undrafted + weight * (not drafted)
        self._fit = None

    def seconds(self, rows: int, tokens: int) -> float | None:
        """How long a cycle with these steps will take; None if no cycle was seen."""
        if not self._weight:
            return None
        mean = self._time / self._weight
        if self._fit is None:
            prior = PRIOR_WEIGHT * np.array([0.0, SEVERAL_SHARE * mean, TOKEN_SHARE * mean])
            self._fit = np.linalg.solve(self._products + np.diag(PRIOR_WEIGHT), self._sums + prior)
        always, several, token = self._fit
        features = _features(rows, tokens)
        # More tokens make no cycle shorter, whatever a few noisy ones say.
        return max(0.1 * mean, float(features @ np.array([always, max(0.0, several), max(0.0, token)])))


def _features(rows: int, tokens: int) -> np.ndarray:
    return np.array([1.0, float(tokens > rows), float(tokens)])

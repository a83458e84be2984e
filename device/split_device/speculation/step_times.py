"""How long steps take, by the number of tokens in them: what decides whether drafts pay."""

from __future__ import annotations

#: What one cycle of steps counts after the next one. Half of what is known is from the latest 50 cycles.
FADING = 0.986

#: Before anything is known: what each token adds to a cycle, what the second one of any step adds to that, and what
#: the padding of one token adds, as shares of the cycle's time.
TOKEN_SHARE = 0.02
SEVERAL_SHARE = 0.0
PADDING_SHARE = 0.0005

#: How much the shares above count, in cycles that differ by one token.
PRIOR_WEIGHT = (1e-6, 0.5, 2.0, 30.0)

#: Cycles that are not looked at: the first ones load what later ones find loaded.
WARM_UP = 2.0

#: Cycles after which the fit is made anew.
FIT_EVERY = 1.0

#: Longest time that is believed, as a multiple of what was expected: a lost worker says nothing about drafts.
BELIEVED = 3.0

#: After so many cycles in a row that were all longer, or all shorter, than expected by this factor, the network or
#: the worker is another one, and older cycles say nothing of what is always there.
SURPRISES = 3.0
SURPRISE = 1.35


class StepTimes:
    """The duration of a cycle, from one choice of tokens to the next one, as a function of the tokens under way.

    It is a sum of four: a part that is always there (the round trip, reading the weights), a part that is there
    once any step has several tokens (other kernels), a part for each token, and one for each token of padding (its
    bytes). They are fitted by least squares, to recent cycles more than to older ones: so they follow the machine
    and its load. Not thread-safe.
    """

    def __init__(self) -> None:
        self._warmed_up = 0.0
        #: Seconds that the second token of a step, each token, and that of padding are thought to add before any
        #: cycle was seen; None for shares of the cycle's time.
        self._prior: tuple[float, ...] | None = None
        #: How often cycles became longer all at once.
        self.slowdowns = 0
        self._begin()

    def _begin(self) -> None:
        #: Sums over cycles, each with its weight: products of `_features`, and of these with the seconds.
        self._products = [[0.0] * 4 for _ in range(4)]
        self._seconds = [0.0] * 4
        #: The four parts, and the least that a cycle can take; None before the first cycle.
        self._fit: tuple[float, float, float, float, float] | None = None
        #: Cycles since the fit.
        self._unfitted = 0.0
        #: How many cycles in a row were longer (or, below 0, shorter) than expected by `SURPRISE`.
        self._surprises = 0.0
        #: How many recent cycles had no drafts.
        self.undrafted = 0.0
        #: Most tokens beyond one for each request that recent cycles had.
        self.widest = 0.0

    def observe(
        self, rows: int, tokens: int, drafted: bool, seconds: float, weight: float, padding: int = 0
    ) -> float:
        """Learns from a cycle.

        Args:
            rows: number of requests whose steps were under way.
            tokens: number of tokens in these steps.
            drafted: whether some of these tokens were drafts.
            seconds: how long it took.
            weight: the share of the cycle that is told of; those of all its requests add up to 1.
            padding: number of tokens that these steps had room for, beyond those that they had.

        Returns:
            How long it took, as far as that is believed.
        """
        if self._warmed_up < WARM_UP:
            self._warmed_up += weight
            return seconds
        expected = self.seconds(rows, tokens, padding)
        if expected is not None:
            self._look(seconds / expected, weight)
            seconds = min(seconds, BELIEVED * expected)
        fade = FADING**weight
        features = _features(rows, tokens, padding)
        for row, one in zip(self._products, features, strict=True):
            for column, other in enumerate(features):
                row[column] = fade * row[column] + weight * one * other
        self._seconds = [
            fade * total + weight * one * seconds for total, one in zip(self._seconds, features, strict=True)
        ]
        self.undrafted = fade * self.undrafted + weight * (not drafted)
        self.widest = max(float(tokens - rows), fade * self.widest)
        self._unfitted += weight
        return seconds

    def _look(self, ratio: float, weight: float) -> None:
        """Begins anew if cycles last longer or shorter than they did. What tokens add is kept as the prior."""
        sign = 1 if ratio > SURPRISE else -1 if ratio * SURPRISE < 1 else 0
        if sign * self._surprises <= 0:
            self._surprises = 0.0
        self._surprises += sign * weight
        if abs(self._surprises) >= SURPRISES and self._fit is not None:
            widest = self.widest
            self._prior = self._fit[1:4]
            self.slowdowns += sign > 0
            self._begin()
            self.widest = widest

    def seconds(self, rows: int, tokens: int, padding: int = 0) -> float | None:
        """How long a cycle with these steps, and so much padding, will take; None if no cycle was seen."""
        if self._fit is None or self._unfitted >= FIT_EVERY:
            self._refit()
        if self._fit is None:
            return None
        always, several, token, padded, least = self._fit
        return max(least, always + several * (tokens > rows) + token * tokens + padded * padding)

    def _refit(self) -> None:
        if (weight := self._products[0][0]) == 0:
            return
        mean = self._seconds[0] / weight
        adds = (0.0, *(self._prior or (SEVERAL_SHARE * mean, TOKEN_SHARE * mean, PADDING_SHARE * mean)))
        products = [list(row) for row in self._products]
        seconds = list(self._seconds)
        for index, (prior_weight, added) in enumerate(zip(PRIOR_WEIGHT, adds, strict=True)):
            products[index][index] += prior_weight
            seconds[index] += prior_weight * added
        always, several, token, padded = _solve(products, seconds)
        # More tokens make no cycle shorter, whatever a few noisy ones say, nor those in the place of padding.
        padded = max(0.0, padded)
        self._fit = always, max(0.0, several), max(padded, token), padded, 0.1 * mean
        self._unfitted = 0.0


def _features(rows: int, tokens: int, padding: int) -> tuple[float, float, float, float]:
    return 1.0, float(tokens > rows), float(tokens), float(padding)


def _solve(matrix: list[list[float]], values: list[float]) -> list[float]:
    """Solves a positive definite system of a few equations, in place. numpy takes ten times as long for so few."""
    size = len(values)
    for index in range(size):
        for below in range(index + 1, size):
            factor = matrix[below][index] / matrix[index][index]
            for column in range(index, size):
                matrix[below][column] -= factor * matrix[index][column]
            values[below] -= factor * values[index]
    for index in reversed(range(size)):
        known = sum(matrix[index][column] * values[column] for column in range(index + 1, size))
        values[index] = (values[index] - known) / matrix[index][index]
    return values

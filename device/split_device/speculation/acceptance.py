"""How many tokens of a draft are accepted, learned as it goes."""

from __future__ import annotations

from collections.abc import Iterator

#: What one draft counts after the next one, in one request's record and in that of all requests.
FADING = 0.9
FADING_OF_ALL = 0.98

#: How many drafts the record of all requests counts for in a new request.
PRIOR_DRAFTS = 2.0

#: The chance of a first draft of which nothing is known.
FIRST_CHANCE = 0.6


class Acceptance:
    """The chance of each token of a draft, given that all before it were accepted. Not thread-safe.

    Args:
        longest: most tokens of a draft.
        others: the record that a new one begins with; None for that of all requests.
    """

    def __init__(self, longest: int, others: Acceptance | None = None) -> None:
        self._others = others
        self._fading = FADING_OF_ALL if others is None else FADING
        self._reached = [0.0] * longest
        self._accepted = [0.0] * longest

    def record(self, drafted: int, accepted: int) -> None:
        """Learns from a draft, of which the first `accepted` tokens were right."""
        for record in (self, self._others) if self._others is not None else (self,):
            # A token after a wrong one says nothing.
            for place in range(min(accepted + 1, drafted)):
                record._reached[place] = record._fading * record._reached[place] + 1
                record._accepted[place] = record._fading * record._accepted[place] + (place < accepted)

    def chances(self) -> Iterator[float]:
        """The chance of each token of a draft. Where little is known, it is that of the token before it."""
        chance = FIRST_CHANCE if self._others is None else next(self._others.chances())
        for reached, accepted in zip(self._reached, self._accepted, strict=True):
            chance = (accepted + PRIOR_DRAFTS * chance) / (reached + PRIOR_DRAFTS)
            yield chance

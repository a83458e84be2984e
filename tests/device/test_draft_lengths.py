"""How many tokens are drafted: as many as pay, on a virtual clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from split_device.speculation.speculation import Cycle, Pace, Speculation

LONGEST = 15
LOGITS = torch.empty(0)

#: Seconds of a cycle with this many rows and tokens.
Cost = Callable[[int, int], float]


class Guess:
    """A drafter whose tokens mean nothing, and which always has some."""

    def extend(self, tokens: Sequence[int]) -> None: ...

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None: ...

    def draft(self, limit: int) -> list[int]:
        return [0] * limit


class Simulation:
    """Requests that decode together until each has generated enough.

    Args:
        cost: how long a cycle takes.
        chance: how likely each drafted token is right if those before it are.
        length: the length of drafts; None for what the policy chooses.
    """

    def __init__(
        self, cost: Cost, chance: float, requests: int = 1, length: int | None = None, noise: float = 0.0
    ) -> None:
        self.cost, self.chance, self.rows, self.length, self.noise = cost, chance, requests, length, noise
        self.now = 0.0
        self.draw = random.Random(4)
        pace = Pace(LONGEST, lambda: self.now)
        self.speculations = [Speculation(pace, Guess(), True) for _ in range(requests)]

    def speed(self, cycles: int) -> float:
        """Tokens per second."""
        tokens = 0
        for _ in range(cycles):
            drafts: list[int] = []
            for each in self.speculations:
                drafted = (
                    len(each.draft(1, LONGEST, self.rows, sum(drafts))) if self.length is None else self.length
                )
                drafts.append(drafted)
            under_way = self.rows + sum(drafts)
            cycle = Cycle(self.now, self.rows, under_way, any(drafts))
            seconds = self.cost(self.rows, under_way)
            self.now += seconds * (1 + self.noise * self.draw.expovariate(1))
            for each, drafted in zip(self.speculations, drafts, strict=True):
                right = next((i for i in range(drafted) if self.draw.random() >= self.chance), drafted)
                tokens += right + 1
                each.cycle = cycle
                each.checked(1, [0] * (drafted + 1), LOGITS, right)
        return tokens / self.now


def loopback(rows: int, tokens: int) -> float:
    """Tokens cost nearly as much as the rest."""
    return 0.01 + 0.004 * tokens


def network(rows: int, tokens: int) -> float:
    """The trip costs much more than tokens."""
    return 0.08 + 0.002 * tokens


def graphs(rows: int, tokens: int) -> float:
    """Steps of one token each have kernels of their own, and take half as long as any others."""
    return 0.01 if tokens == rows else 0.02 + 0.0001 * tokens


COSTS: dict[str, Cost] = {"loopback": loopback, "network": network, "graphs": graphs}


#: What drafts gain where they pay: times the tokens per second of none, by cost, requests and chance.
GAINS = {("loopback", 1, 0.9): 1.6, ("network", 1, 0.3): 1.15, ("network", 1, 0.9): 4.5, ("network", 16, 0.9): 1.6}


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("requests", [1, 16])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.9])
def test_it_drafts_where_that_pays_and_costs_little_where_it_does_not(
    name: str, requests: int, chance: float
) -> None:
    cycles = 600 if requests == 1 else 100
    auto = Simulation(COSTS[name], chance, requests, noise=0.2).speed(cycles)
    off = Simulation(COSTS[name], chance, requests, length=0, noise=0.2).speed(cycles)
    assert auto / off > GAINS.get((name, requests, chance), 0.95)

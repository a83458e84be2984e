"""How many tokens are drafted: as many as pay, on a virtual clock."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from split_device.speculation.speculation import MOST_ALLOWANCE, Cycle, Pace, Speculation

LONGEST = 15
LOGITS = torch.empty(0)

#: How much longer than it should a cycle takes on average, as a share.
NOISE = 0.2

#: Seconds of a cycle with this many rows and tokens.
Cost = Callable[[int, int], float]


class Guess:
    """A drafter that always has some tokens, all of them 0."""

    def extend(self, tokens: Sequence[int]) -> None: ...

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None: ...

    def draft(self, limit: int) -> list[int]:
        return [0] * limit


class Simulation:
    """Requests that decode together until each has generated enough.

    Args:
        cost: how long a cycle takes.
        chance: how likely each drafted token is right if those before it are.
        seed: of what is accepted, and of the noise.
        padded: how much longer cycles are for the room of their steps, as a share; None for steps without padding.
    """

    def __init__(
        self,
        cost: Cost,
        chance: float,
        requests: int = 1,
        seed: int = 4,
        padded: Mapping[int, float] | None = None,
    ) -> None:
        self.cost, self.chance, self.rows, self.padded = cost, chance, requests, padded
        #: The clock, and what it would say without noise.
        self.now = self.quiet = 0.0
        self.draw = random.Random(seed)
        self.pace = Pace(LONGEST, lambda: self.now, padded is not None)
        self.speculations = [Speculation(self.pace, Guess(), True) for _ in range(requests)]

    def speedup(self, cycles: int) -> float:
        """Tokens per second over those without drafts. The noise that the policy sees does not count."""
        tokens, began = 0, self.quiet
        for _ in range(cycles):
            drafts: list[int] = []
            room = self.pace.room.tokens if self.pace.room is not None else 0
            limit = room - 1 if room else LONGEST
            for each in self.speculations:
                drafts.append(len(each.draft(1, limit, self.rows, sum(drafts))))
            under_way = self.rows + sum(drafts)
            padding = max(0, self.rows * room - under_way)
            cycle = Cycle(self.now, self.rows, under_way, any(drafts), padding)
            seconds = self.cost(self.rows, under_way)
            if self.padded is not None:
                # The bytes of what is drafted are there anyway.
                seconds += self.cost(self.rows, self.rows) * self.padded[room]
            self.quiet += seconds
            self.now += seconds * (1 + NOISE * self.draw.expovariate(1))
            for each, drafted in zip(self.speculations, drafts, strict=True):
                right = next((i for i in range(drafted) if self.draw.random() >= self.chance), drafted)
                tokens += right + 1
                each.cycle = cycle
                if self.padded is not None:
                    # If it was not drafted, the next token might have been.
                    each.extend([0] * right + [int(drafted > 0 or self.draw.random() >= self.chance)])
                each.checked(1, [0] * (drafted + 1), LOGITS, right)
        return tokens / (self.quiet - began) / (self.rows / self.cost(self.rows, self.rows))


def loopback(rows: int, tokens: int) -> float:
    """Tokens cost nearly as much as the rest."""
    return 0.01 + 0.004 * tokens


def network(rows: int, tokens: int) -> float:
    """The trip costs much more than tokens."""
    return 0.08 + 0.002 * tokens


def graphs(rows: int, tokens: int) -> float:
    """Steps of one token each have kernels of their own, and take half as long as any others."""
    return 0.01 if tokens == rows else 0.02 + 0.0001 * tokens


def computing(rows: int, tokens: int) -> float:
    """No trip, and nothing that several tokens share: the worst case for drafts."""
    return 0.01 * tokens


COSTS: dict[str, Cost] = {"loopback": loopback, "network": network, "graphs": graphs, "computing": computing}


#: What drafts gain where they pay: times the tokens per second of none, by cost, requests and chance.
GAINS = {("loopback", 1, 0.9): 1.6, ("network", 1, 0.3): 1.15, ("network", 1, 0.9): 4.5, ("network", 16, 0.9): 1.6}

#: The least share of the tokens per second of no drafts: at most 3 % may be lost, and this leaves a margin.
LEAST = 0.975


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("requests", [1, 16])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.9])
def test_it_drafts_where_that_pays_and_costs_little_where_it_does_not(
    name: str, requests: int, chance: float
) -> None:
    speedup = Simulation(COSTS[name], chance, requests).speedup(600 if requests == 1 else 100)
    assert speedup > GAINS.get((name, requests, chance), LEAST)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.9])
def test_the_first_short_answers_of_a_process_are_hardly_slower(name: str, chance: float) -> None:
    """Nothing is known yet, and no later gain makes up for it."""
    speedups = [Simulation(COSTS[name], chance, seed=seed).speedup(63) for seed in range(8)]
    assert sum(speedups) / len(speedups) > LEAST


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.9])
def test_a_trip_that_gets_longer_or_shorter_is_not_blamed_on_drafts(chance: float) -> None:
    """As when a laptop moves between networks: what is known of one trip says little of the next one."""
    simulation = Simulation(loopback, chance)
    speedups = []
    for trip in (0.0, 0.2, 0.02, 0.2, 0.0, 0.08):
        simulation.cost = functools.partial(lambda trip, rows, tokens: trip + loopback(rows, tokens), trip)
        speedups.append(simulation.speedup(100))
    # As much is generated after each move.
    assert len(speedups) / sum(1 / each for each in speedups) > LEAST


#: How much longer cycles are for the room that steps have, as shares.
PADDED: dict[str, dict[int, float]] = {
    "nothing": {1: 0.0, 4: 0.0, 16: 0.0},
    "fast network": {1: 0.0, 4: 0.008, 16: 0.04},
    "slow network": {1: 0.0, 4: 0.2, 16: 1.0},
    "losses": {1: 0.0, 4: 0.15, 16: 2.0},
    "very slow network": {1: 0.0, 4: 2.0, 16: 10.0},
}

#: As `LEAST`, where the first try of more room costs two cycles, and so 3 % of a first short answer.
LEAST_OF_FIRST = 0.96

#: What drafts gain where they pay, by what padding costs and chance.
PADDED_GAINS = {
    ("nothing", 0.9): 3.5,
    ("fast network", 0.3): 1.1,
    ("fast network", 0.9): 3.5,
    ("slow network", 0.9): 2.0,
    ("losses", 0.9): 1.3,
}


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("requests", [1, 16])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.9])
def test_padding_costs_little_where_drafts_do_not_pay(name: str, requests: int, chance: float) -> None:
    speedups = [
        Simulation(network, chance, requests, seed, PADDED[name]).speedup(600 if requests == 1 else 100)
        for seed in range(2)
    ]
    least = PADDED_GAINS.get((name, chance), LEAST) if requests == 1 else LEAST
    assert sum(speedups) / len(speedups) > least


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.9])
def test_the_first_padded_answers_of_a_process_are_hardly_slower(name: str, chance: float) -> None:
    speedups = [Simulation(network, chance, seed=seed, padded=PADDED[name]).speedup(63) for seed in range(8)]
    assert sum(speedups) / len(speedups) > LEAST_OF_FIRST


def test_requests_that_are_cancelled_take_nothing_from_the_others() -> None:
    simulation = Simulation(loopback, 0.9)
    simulation.speedup(20)
    for _ in range(50):
        cancelled = Speculation(simulation.pace, Guess(), True)
        assert cancelled.draft(1, LONGEST, 1)
        cancelled.ended()


@pytest.mark.parametrize("fixed", [True, False])
def test_only_room_that_is_chosen_is_paid_for(fixed: bool) -> None:
    """Steps that follow a grammar always have room for what it forces. Drafts do not owe what that takes."""
    now = 0.0
    pace = Pace(LONGEST, lambda: now, pads=True)

    def steps(count: int, seconds: float, padding: int) -> None:
        nonlocal now
        for _ in range(count):
            cycle = Cycle(now, 1, 1, False, padding, padding if fixed else 0)
            now += seconds
            pace.stepped(cycle, 1, 0, measures=True)

    steps(30, 0.1, 0)
    steps(200, 0.4, 15)
    assert pace.allowance is not None
    assert (pace.allowance > 0) == fixed
    # Nor does a debt last for thousands of steps.
    assert pace.allowance >= -0.2 * MOST_ALLOWANCE

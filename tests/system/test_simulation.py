"""Sequences of events against the real device, broker and worker: every output is the right one.

`make test` runs 250 sequences, with `make test-long` it is 5,000, and `make test-nightly` runs 55,000 others. A
failure prints the seed and the shortest list of acts that still fails. SIMULATION_SEED=N tries other ones.
"""

from __future__ import annotations

import copy
import logging
import os
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from simulation import FAULTS, PRIME, World, link_of, mixed, outcome, outcomes, path_to
from split_common.engine.trees import depths, is_chain
from split_common.errors import NoWorker, UnsupportedFeature
from split_common.trust.fleet import Fleet
from split_device.models.flight import FlyingCacheLayer, Landed, Leg
from split_device.models.prepared import StepContext
from split_device.models.traits import Traits

#: Sequences in one test.
SEQUENCES = 250

#: The tests of `make test`, of `make test-long` as well, and of `make test-nightly`.
CHUNKS = [
    0,
    *(pytest.param(chunk, marks=pytest.mark.long) for chunk in range(1, 20)),
    *(pytest.param(chunk, marks=pytest.mark.nightly) for chunk in range(20, 240)),
]

#: What a sequence is made of, and how often.
ACTS = (
    ("step",) * 8
    + ("speculate", "branch", "branch", "fly", "fly", "crop", "reorder", "repeat", "copy", "drop", "wait")
    + FAULTS
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet.create(tmp_path_factory.mktemp("fleet") / "keys")


@pytest.fixture(autouse=True)
def _quietly() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Generation:
    """A cache, and what each of its rows was given, as it would be without a split."""

    def __init__(self, world: World, layer: FlyingCacheLayer, rows: int) -> None:
        self.world = world
        self.layer = layer
        self.rows: list[list[int]] = [[] for _ in range(rows)]

    def step(self, choose: random.Random, tokens: int | None = None, room: int | None = None) -> None:
        tokens = self._fitting(choose, tokens or choose.choice([1, 1, 1, 2, 3, 9]))
        length = len(self.rows[0])
        states = torch.tensor([[[float(choose.randrange(PRIME))] for _ in range(tokens)] for _ in self.rows])
        if not length and choose.random() < 0.5:
            # Equal rows travel once.
            states = states[:1].expand_as(states).clone()
        self.world.spare_step()
        output = self._output(states, StepContext(room=room))
        positions = np.arange(length, length + tokens)
        for row, given_, got in zip(self.rows, states, output, strict=True):
            row += mixed(given_.view(-1).numpy(), positions).astype(int).tolist()
            assert got.view(-1).tolist() == outcome(np.asarray(row), tokens).tolist()

    def _fitting(self, choose: random.Random, tokens: int) -> int:
        """So many new tokens; or 1 after tokens were taken back, if the smallest worker's memory holds no more."""
        while len(self.rows) * (2 + (len(self.rows[0]) + tokens) // 4) > 14:
            self.crop(choose)
            tokens = 1
        return tokens

    def _output(self, states: torch.Tensor, context: StepContext) -> torch.Tensor:
        """A new session is not waited with for a first worker, one that was lost is."""
        try:
            return self.layer.step(states, context)
        except NoWorker:
            assert not self.rows[0]
            self.world.clock.sleep(12.0)
            return self.layer.step(states, context)

    def speculate(self, choose: random.Random) -> None:
        """Steps of a token and a draft, of which a part is right; as `ActiveRequest.drop_drafts` goes on."""
        for _ in range(2):
            drafted = choose.randrange(4)
            self.step(choose, 1 + drafted, choose.choice([None, 2, 4]))
            # Without room for the draft, the step was one of a token.
            keep = max(1, len(self.rows[0]) - choose.randrange(drafted + 1))
            if keep < len(self.rows[0]):
                self.layer.crop(keep)
                self.rows = [row[:keep] for row in self.rows]

    def branch(self, choose: random.Random) -> None:
        """Steps of a token and a tree, of which a path stays; as `ActiveRequest.drop_drafts` goes on."""
        for _ in range(2):
            if len(self.rows) > 1 or not self.rows[0] or not self.layer.takes_trees:
                self.speculate(choose)
                return
            parents = [
                -1,
                *(choose.randrange(at) for at in range(1, self._fitting(choose, 1 + choose.randrange(6)))),
            ]
            (row,), tokens = self.rows, len(parents)
            length = len(row)
            states = torch.tensor([[[float(choose.randrange(PRIME))] for _ in parents]])
            room, tree = choose.choice([None, 8]), () if is_chain(parents) else parents
            self.world.spare_step()
            try:
                output = self._output(states, StepContext(room=room, parents=tree))
                self.world.trees += bool(tree)
            except UnsupportedFeature:
                # Another worker has it, which takes none.
                assert tree
                tokens, tree = 1, ()
                output = self._output(states[:, :1], StepContext(room=room))
            places = np.asarray([length + depth for depth in depths(parents[:tokens])])
            keys = mixed(states.view(-1).numpy()[:tokens], places).astype(int)
            assert (
                output.view(-1).tolist() == outcomes(np.asarray([*row, *keys]), tokens, parents[:tokens]).tolist()
            )
            path = path_to(parents, choose.randrange(tokens))
            if tree:
                self.layer.keep(length + 1, [token - 1 for token in path[1:]])
            elif len(path) < tokens:
                self.layer.crop(length + len(path))
            row += keys[path].tolist()

    def fly(self, choose: random.Random) -> None:
        """Steps that are sent before it is known whether those in front are right; as `Legs` goes on."""
        if len(self.rows) > 1 or not self.rows[0]:
            return
        if len(self.rows[0]) > 24:
            self.layer.crop(24)
            self.rows = [self.rows[0][:24]]
        # Requests whose drafts are trees send none ahead.
        self.step(choose, 1)
        self.world.spare_step()
        landed = Flights(self, choose).run()
        assert landed.error is None
        assert not landed.lost

    def crop(self, choose: random.Random) -> None:
        length = len(self.rows[0])
        if length > 1:
            keep = choose.choice([1, length - 1, choose.randrange(1, length)])
            self.layer.crop(keep - length)
            self.rows = [row[:keep] for row in self.rows]

    def reorder(self, choose: random.Random) -> None:
        if self.rows[0]:
            rows = [choose.randrange(len(self.rows)) for _ in self.rows]
            self.layer.reorder_cache(torch.tensor(rows))
            self.rows = [list(self.rows[row]) for row in rows]

    def repeat(self, choose: random.Random) -> None:
        # Nothing has rows that come from a tree which its worker still holds.
        settled = self.layer.settled == self.layer.get_seq_length()
        if self.rows[0] and len(self.rows) < 3 and settled:
            self.layer.batch_repeat_interleave(2)
            self.rows = [list(row) for row in self.rows for _ in range(2)]

    def copy(self) -> Generation:
        twin = Generation(self.world, copy.deepcopy(self.layer), 0)
        twin.rows = [list(row) for row in self.rows]
        return twin


class Flights:
    """Legs as a request would send them, up to four at once: each may turn out to have begun at a wrong token."""

    def __init__(self, generation: Generation, choose: random.Random) -> None:
        self._generation, self._choose = generation, choose
        self._left = choose.randrange(1, 8)
        self._ready: list[Leg] = []
        #: Those that are not checked, in their order.
        self._air: list[Leg] = []

    def run(self) -> Landed:
        self._add(len(self._generation.rows[0]), True)
        self._send_ahead()
        return self._generation.layer.fly(self._ready.pop(0), self._take, self._output)

    def _take(self) -> Leg | None:
        return self._ready.pop(0) if self._ready else None

    def _add(self, start: int, begins: bool) -> None:
        states = torch.tensor([[float(self._choose.randrange(PRIME))] for _ in range(self._choose.choice([1, 2]))])
        leg = Leg(start, len(states), begins, self._choose.choice([None, 2]), states)
        self._air.append(leg)
        self._ready.append(leg)
        self._left -= 1

    def _send_ahead(self) -> None:
        while self._left > 0 and len(self._air) < 4 and self._choose.random() < 0.7:
            self._add(self._air[-1].start + self._air[-1].tokens, False)

    def _output(self, leg: Leg, output: torch.Tensor) -> None:
        # The worker had what was sent before, right or not.
        positions = np.arange(leg.start, leg.start + leg.tokens)
        row = self._generation.rows[0]
        row[leg.start :] = mixed(leg.states.view(-1).numpy(), positions).astype(int).tolist()
        assert output.view(-1).tolist() == outcome(np.asarray(row), leg.tokens).tolist()
        if leg.void:
            return
        assert self._air.pop(0) is leg
        if self._choose.random() < 0.4:
            for each in reversed(self._air):
                each.void = True
            self._air.clear()
            if self._left > 0:
                self._add(self._choose.randrange(leg.start + 1, leg.start + leg.tokens + 1), True)
        self._send_ahead() if self._air else None
        self._generation.layer.nudge()


def run_sequence(fleet: Fleet, number: int, acts: list[str], patch: pytest.MonkeyPatch) -> World:
    """Raises when anything is lost, wrong or left behind."""
    world = World(fleet, number, patch)
    choose = world.random
    workers = choose.choice([1, 2, 3])
    for _ in range(workers):
        world.start_worker()
    world.clock.sleep(1.0)
    memory = choose.choice([0, 64, 10**6])
    client = world.start_client()

    def new_layer() -> FlyingCacheLayer:
        return FlyingCacheLayer(client, Traits(False, False), history_memory=memory)

    generations = [Generation(world, new_layer(), choose.choice([1, 1, 2, 3]))]
    faults = 0
    for act in acts:
        generation = choose.choice(generations)
        match act:
            case "step":
                generation.step(choose)
                faults = 0
            case "speculate" | "branch" | "fly":
                getattr(generation, act)(choose)
                faults = 0
            case "copy":
                if len(generations) < 4:
                    generations.append(generation.copy())
                else:
                    generations[0].layer.reset()
                    generations[0] = Generation(world, new_layer(), 1)
            case "drop" if len(generations) > 1:
                generations.remove(generation)
                generation.layer.reset()
            case "wait":
                world.clock.sleep(choose.choice([0.5, 5.0, 15.0]))
            case "crop" | "reorder" | "repeat":
                getattr(generation, act)(choose)
            case _ if act in FAULTS and faults < 3:
                faults += 1
                world.fault(act, choose.choice([0.0, choose.uniform(0, 0.1), choose.uniform(0, 1.0)]))
    for generation in generations:
        generation.step(choose)
        generation.layer.reset()
    check_nothing_left(world, client)
    world.counters = (
        Counter(trees=world.trees) + client.counters + sum((worker.counters for worker in world.workers), Counter())
    )
    return world


def check_nothing_left(world: World, client: Any) -> None:
    world.loss = 0.0
    world.clock.sleep(10.0)
    assert not client._sessions
    client.close()
    world.clock.sleep(8.0)
    for worker in world.workers:
        link = link_of(worker)
        if link.up:
            assert (len(worker._sessions), worker._compute.queued_bytes) == (0, 0)
            assert worker._body.store.free == worker._body.store.pages  # type: ignore[attr-defined]
            assert not worker._channels.open
            assert worker._compute.failure is None
    for link in world.links.values():
        assert link.counters["HandlerError"] == 0
    assert world.broker.counters["failures"] == 0


def acts_of(number: int) -> list[str]:
    choose = random.Random(number)
    return [choose.choice(ACTS) for _ in range(14)]


def test_the_world_is_rough(fleet: Fleet) -> None:
    """What the other tests rely on does happen."""
    happened = ("replays", "late", "evictions", "hung", "channels", "steps", "trees")
    refused = ("busy", "full", "lost", "failed", "evicted")
    missing = {*happened, *(f"refused_{reason}" for reason in refused)}
    for number in range(300):
        with pytest.MonkeyPatch.context() as patch:
            counters = run_sequence(fleet, number, acts_of(number), patch).counters
        missing -= {name for name in missing if counters[name]}
        if not missing:
            return
    assert not missing


def test_a_seed_gives_the_same_sequence_again(fleet: Fleet) -> None:
    for number in range(5):
        ends = []
        for _ in range(2):
            with pytest.MonkeyPatch.context() as patch:
                world = run_sequence(fleet, number, acts_of(number), patch)
                times = ("queue_us", "body_us")
                counters = {name: count for name, count in world.counters.items() if name not in times}
                ends.append((counters, round(world.clock.now - world.began, 3), world.random.random()))
        assert ends[0] == ends[1]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_output_is_right_whatever_happens(fleet: Fleet, chunk: int) -> None:
    @seed(chunk + len(CHUNKS) * int(os.environ.get("SIMULATION_SEED", "0")))
    @settings(max_examples=SEQUENCES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**63), st.lists(st.sampled_from(ACTS), min_size=2, max_size=10))
    def run(number: int, acts: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            run_sequence(fleet, number, acts, patch)

    run()

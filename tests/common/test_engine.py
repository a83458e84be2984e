"""The engine against transformers' own layers: whoever shares the batch, a row's output is its own.

The oracle recomputes a row's whole history in one forward of the model's own attention, without the pool.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import tiny
from split_common.engine import attention, sdpa
from split_common.engine.linear import pack_linears
from split_common.engine.pool import PagePool
from split_common.engine.runner import Runner, build_runner
from split_common.engine.sequences import KVSequence, TokenRun
from split_common.engine.trees import Kept, depths
from split_common.engine.tuning import UNMEASURED
from split_common.errors import Evicted, ModelError
from split_common.models.loading import load_part, read_spec
from split_common.models.split import Split

KV_BYTES = 1 << 20
SEPARATE = ("falcon", "bloom", *tiny.HYBRID)


def make_runner(directory: Path, arch: str, **config: Any) -> Runner:
    checkpoint = tiny.save(arch, directory, **config)
    spec = read_spec(str(checkpoint))
    split = Split.parse(spec.layers, "1:-2")
    model, stack = load_part(spec, split, "worker")
    if attention.ATTENTION_NAME != "eager":
        return build_runner(stack, split, spec.text_config, KV_BYTES, pack_linears(model, stack))
    return build_runner(stack, split, spec.text_config, KV_BYTES)


@pytest.mark.numbers
@pytest.mark.parametrize(("arch", "indivisible"), [("doge", True), ("llama", False), ("qwen3_next", False)])
def test_layers_that_compute_tokens_otherwise_in_parts(arch: str, indivisible: bool, tmp_path: Path) -> None:
    runner = make_runner(tmp_path, arch)
    assert (runner.indivisible, runner.divisible) == (indivisible, not indivisible)


def test_kernels_are_few(tmp_path: Path) -> None:
    """However many tokens forwards have: oneDNN keeps half a MiB for each number of rows that it meets."""
    runner = make_runner(tmp_path, "llama")
    resident = psutil.Process().memory_info

    def forwards(counts: Iterable[int]) -> None:
        for count in counts:
            row = runner.store.new_sequence()
            (output,) = runner.run([TokenRun(row, torch.randn(count, runner.width), range(count))])
            assert output.shape == (count, runner.width)
            row.free()

    forwards(dict.fromkeys(map(UNMEASURED.padded, range(1, 129))))
    before = resident().rss
    forwards(range(1, 129))
    assert resident().rss - before < 16 * 2**20


def make_oracle(directory: Path, arch: str, monkeypatch: pytest.MonkeyPatch, **config: Any) -> Runner:
    """A runner that keeps the model's own attention and layers, and runs one row at a time."""
    with monkeypatch.context() as patch:
        patch.setattr(attention, "ATTENTION_NAME", "eager")
        runner = make_runner(directory, arch, **config)
    assert runner.unpacked_because
    return runner


@dataclass
class Pair:
    """A row of the engine, and all that was appended to it."""

    row: KVSequence
    states: torch.Tensor
    positions: list[int] = field(default_factory=list)


def path_to(parents: list[int], node: int) -> list[int]:
    """The nodes of a tree from its root to this one."""
    return [*path_to(parents, parents[node]), node] if node >= 0 else []


class EngineMachine(RuleBasedStateMachine):
    """Prefill, decode, rollback, fork, reorder and close in any order and mix."""

    engine: Runner
    oracle: Runner
    steps = trees = 0

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[Pair] = []
        self.generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            self.open()

    @rule()
    def open(self) -> None:
        if len(self.pairs) < 6:
            self.pairs.append(Pair(self.engine.store.new_sequence(), torch.empty(0, self.engine.width)))

    @precondition(lambda self: self.pairs)
    @rule(counts=st.lists(st.sampled_from([0, 1, 1, 1, 2, 5, 17]), min_size=6, max_size=6), skip=st.integers(0, 3))
    def step(self, counts: list[int], skip: int) -> None:
        runs, chosen = [], []
        for pair, count in zip(self.pairs, counts, strict=False):
            if not count or len(pair.positions) + count > 120:
                continue
            states = torch.randn(count, self.engine.width, generator=self.generator)
            start = pair.positions[-1] + 1 + (skip if not pair.positions else 0) if pair.positions else skip
            positions = list(range(start, start + count))
            runs.append(TokenRun(pair.row, states, positions))
            pair.states = torch.cat([pair.states, states])
            pair.positions = pair.positions + positions
            chosen.append((pair, count))
        if not runs:
            return
        type(self).steps += len(runs)
        for output, (pair, count) in zip(self.engine.run(runs), chosen, strict=True):
            wanted = self.recompute(pair)[-count:]
            assert pair.row.length == len(pair.positions)
            torch.testing.assert_close(output, wanted, atol=2e-4 * float(wanted.abs().max()), rtol=1e-3)

    def recompute(self, pair: Pair) -> torch.Tensor:
        row = self.oracle.store.new_sequence()
        (output,) = self.oracle.run([TokenRun(row, pair.states, pair.positions)])
        row.free()
        return output

    @precondition(lambda self: self.pairs and self.engine.takes_trees)
    @rule(pick=st.integers(0, 5), draws=st.lists(st.integers(0, 7), min_size=2, max_size=9), later=st.booleans())
    def branch(self, pick: int, draws: list[int], later: bool) -> None:
        """A tree beside a neighbour's decoding; then one of its paths stays, at once or with the next step."""
        pair, neighbour = self.pairs[pick % len(self.pairs)], self.pairs[(pick + 1) % len(self.pairs)]
        if len(pair.positions) + len(draws) > 100:
            return
        parents = [draw % (node + 1) - 1 for node, draw in enumerate(draws)]
        begin, first = len(pair.positions), pair.positions[-1] + 1 if pair.positions else 0
        states = torch.randn(len(draws), self.engine.width, generator=self.generator)
        places = [first + depth for depth in depths(parents)]
        runs = [TokenRun(pair.row, states, places, parents=parents)]
        if neighbour is not pair and len(neighbour.positions) < 100:
            place = [neighbour.positions[-1] + 1 if neighbour.positions else 0]
            runs.append(TokenRun(neighbour.row, states[:1], place))
            neighbour.states, neighbour.positions = (
                torch.cat([neighbour.states, states[:1]]),
                neighbour.positions + place,
            )
        outputs = self.engine.run(runs)
        before = Pair(pair.row, pair.states, pair.positions)
        for leaf in {len(draws) - 1, draws[0] % len(draws)}:
            path = path_to(parents, leaf)
            pair.states = torch.cat([before.states, states[path]])
            pair.positions = [*before.positions, *(places[node] for node in path)]
            wanted = self.recompute(pair)[-len(path) :]
            torch.testing.assert_close(outputs[0][path], wanted, atol=2e-4 * float(wanted.abs().max()), rtol=1e-3)
        type(self).trees += 1
        type(self).steps += len(runs)
        kept = path[: draws[1]]
        pair.states = torch.cat([before.states, states[kept]])
        pair.positions = [*before.positions, *(places[node] for node in kept)]
        if not later:
            pair.row.keep(begin, kept)
            return
        state, place = torch.randn(1, self.engine.width, generator=self.generator), [first + len(kept)]
        run = TokenRun(pair.row, state, place, kept=Kept(begin, kept))
        free, cost = self.engine.store.free, run.memory(1)
        pair.states, pair.positions = torch.cat([pair.states, state]), pair.positions + place
        (output,) = self.engine.run([run])
        assert free - self.engine.store.free <= max(0, cost)
        wanted = self.recompute(pair)[-1:]
        torch.testing.assert_close(output, wanted, atol=2e-4 * float(wanted.abs().max()), rtol=1e-3)

    @precondition(lambda self: self.pairs)
    @rule(pick=st.integers(0, 5), tokens=st.integers(1, 30))
    def roll_back(self, pick: int, tokens: int) -> None:
        pair = self.pairs[pick % len(self.pairs)]
        keep = max(0, len(pair.positions) - tokens)
        # States are taken back by a few tokens at least. Beyond that the row stays as it is.
        try:
            pair.row.truncate(keep)
        except Evicted:
            assert tokens > 1
            return
        pair.states, pair.positions = pair.states[:keep], pair.positions[:keep]

    @precondition(lambda self: self.pairs)
    @rule(rows=st.lists(st.integers(0, 5), min_size=1, max_size=6))
    def select(self, rows: list[int]) -> None:
        """What a beam search does: rows are forked, reordered and dropped."""
        old = self.pairs
        self.pairs = []
        for pick in rows:
            pair = old[pick % len(old)]
            self.pairs.append(Pair(pair.row.fork(), pair.states, list(pair.positions)))
        for pair in old:
            pair.row.free()

    @precondition(lambda self: self.pairs)
    @rule(pick=st.integers(0, 5))
    def close(self, pick: int) -> None:
        self.pairs.pop(pick % len(self.pairs)).row.free()

    @invariant()
    def no_memory_is_lost(self) -> None:
        if not self.pairs:
            assert self.engine.store.free_tokens == self.engine.store.capacity

    def teardown(self) -> None:
        for pair in self.pairs:
            pair.row.free()
        assert self.engine.store.free_tokens == self.engine.store.capacity


#: Kinds of layers, an architecture for each: `make test` runs these.
KINDS = ("llama", "qwen2", "gemma3_text", "gpt2", "gpt_oss", "opt", "qwen3_next", "lfm2", "mamba2")

#: Those whose products, convolutions and norms differ: what is compared on other CPUs.
ON_OTHER_CPUS = ("llama", "gpt2", "gpt_oss", "lfm2", "mamba2")

#: Among the longer tests: windows everywhere, one norm for attention and MLP, experts, compressed keys, singly.
LONGER = ("mistral", "gpt_neox", "mixtral", "deepseek_v3", "falcon")

#: Left to the night.
OTHERS = (*(each for each in tiny.LISTED if each not in (*KINDS, *LONGER)), "cohere2", "stablelm")


@pytest.mark.parametrize(
    "arch",
    [
        *(pytest.param(each, marks=[pytest.mark.numbers] * (each in ON_OTHER_CPUS)) for each in KINDS),
        *(pytest.param(each, marks=pytest.mark.long) for each in LONGER),
        *(pytest.param(each, marks=pytest.mark.nightly) for each in OTHERS),
    ],
)
def test_any_mix_of_steps(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_runner(tmp_path / "engine", arch)
    assert (engine.unpacked_because is not None) == (arch in SEPARATE)
    oracle = make_oracle(tmp_path / "oracle", arch, monkeypatch)
    machine = type(f"{arch}Machine", (EngineMachine,), {"engine": engine, "oracle": oracle})
    run_state_machine_as_test(
        machine,
        # Where sequences run one at a time, there is less to be mixed up, and each step takes longer.
        settings=settings(
            max_examples=8 if arch in SEPARATE else 16,
            stateful_step_count=30,
            deadline=None,
            database=None,
            derandomize=True,
        ),
    )
    assert machine.steps > 30
    assert (machine.trees > 5) == engine.takes_trees
    assert engine.takes_trees == (arch not in SEPARATE)


@pytest.mark.numbers
@pytest.mark.parametrize("arch", ["afmoe", "olmo"])
def test_layers_that_view_the_output_of_attention_or_have_no_parameters_are_packed(
    arch: str, tmp_path: Path
) -> None:
    """Four tokens are computed without padding rows, which would copy the output."""
    engine = make_runner(tmp_path, arch)
    assert engine.unpacked_because is None
    runs = [TokenRun(engine.store.new_sequence(), torch.randn(2, engine.width), [0, 1]) for _ in range(2)]
    together = engine.run(runs)
    for run, output in zip(runs, together, strict=True):
        (alone,) = engine.run([TokenRun(engine.store.new_sequence(), run.states, [0, 1])])
        torch.testing.assert_close(output, alone, atol=1e-4, rtol=1e-3)


@pytest.mark.numbers
@pytest.mark.parametrize("threshold", [1, 10**9])
def test_batched_and_single_decoding_agree(threshold: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_runner(tmp_path / "engine", "llama")
    oracle = make_oracle(tmp_path / "oracle", "llama", monkeypatch)
    monkeypatch.setattr(sdpa, "BATCHED_SEQUENCES", threshold)
    states = [torch.randn(count, engine.width) for count in (3, 40, 1, 7, 17)]
    rows = [engine.store.new_sequence() for _ in states]
    engine.run([TokenRun(row, each, range(len(each))) for row, each in zip(rows, states, strict=True)])
    new = [torch.randn(1, engine.width) for _ in states]
    outputs = engine.run([TokenRun(row, each, [row.length]) for row, each in zip(rows, new, strict=True)])
    for before, last, output in zip(states, new, outputs, strict=True):
        row = oracle.store.new_sequence()
        (wanted,) = oracle.run([TokenRun(row, torch.cat([before, last]), range(len(before) + 1))])
        torch.testing.assert_close(output, wanted[-1:], atol=1e-4, rtol=1e-3)


@pytest.mark.numbers
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        },
    ],
    ids=["dynamic", "longrope"],
)
def test_a_longer_neighbour_does_not_change_length_dependent_rotary_embeddings(
    scaling: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "rope_parameters": scaling,
        "max_position_embeddings": 16 if scaling["rope_type"] == "dynamic" else 64,
    }
    engine = make_runner(tmp_path / "engine", "llama", **config)
    oracle = make_oracle(tmp_path / "oracle", "llama", monkeypatch, **config)
    short, long = torch.randn(5, engine.width), torch.randn(40, engine.width)
    runs = [TokenRun(engine.store.new_sequence(), each, range(len(each))) for each in (long, short)]
    outputs = engine.run(runs)
    for each, output in zip((long, short), outputs, strict=True):
        (wanted,) = oracle.run([TokenRun(oracle.store.new_sequence(), each, range(len(each)))])
        torch.testing.assert_close(output, wanted, atol=1e-4, rtol=1e-3)


def test_the_pool_is_sized_by_its_memory(tmp_path: Path) -> None:
    engine = make_runner(tmp_path, "llama")
    assert isinstance(engine.store, PagePool)
    held = sum(keys.nbytes + values.nbytes for keys, values in engine.store.layers.values())
    assert KV_BYTES - held < KV_BYTES / engine.store.pages


@pytest.mark.parametrize("arch", ["qwen3_next", "mamba2"])
def test_states_count_as_memory_of_each_sequence(arch: str, tmp_path: Path) -> None:
    """Twice, because of the snapshot; also where there are no keys and values."""
    runner = make_runner(tmp_path, arch)
    store = runner.store
    row = store.new_sequence()
    assert (row.cost(5), store.held_by([row])) == (5 + store.sequence_tokens, 0)
    runner.run([TokenRun(row, torch.randn(5, runner.width), range(5))])
    unit = max(1, row.key_bytes // 5)  # type: ignore[attr-defined]
    assert store.sequence_tokens * unit >= 2 * row.state_bytes > 0  # type: ignore[attr-defined]
    assert row.cost(5) == 5
    twin = row.fork()
    assert store.capacity - store.free == 2 * store.held_by([row]) == 2 * (5 + store.sequence_tokens)
    assert store.freed_by([row, twin]) == store.capacity - store.free
    twin.free()
    row.truncate(0)
    assert store.free == store.capacity
    with pytest.raises(ModelError, match="its states alone take"):
        build_runner(runner.layers.stack, runner.layers.split, read_spec(str(tmp_path)).text_config, 1000)

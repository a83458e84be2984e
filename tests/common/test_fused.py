"""Layers that are computed in one call of our own code: which ones are, what they give; what if there is none."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from split_common.engine import fused_layers, fusing, linear, native
from split_common.engine.fused_sketch import sketch_layers
from split_common.engine.linear import pack_linears
from split_common.engine.packed import PackedExecutor
from split_common.engine.runner import Runner, build_runner
from split_common.engine.sequences import TokenRun
from split_common.models.layer_stack import LayerStack
from split_common.models.loading import ModelSpec, load_part, read_spec
from split_common.models.split import Split

KV_BYTES = 1 << 21

#: Of the usual shape: with biases, windows, norms of queries and keys, joined weights, other heads.
USUAL = ("llama", "qwen2", "qwen2_sw", "qwen3", "mistral", "phi3")

#: Of another one: no gate, another norm, further norms, experts, one norm for attention and MLP.
UNUSUAL = ("gpt2", "gpt_neox", "gemma2", "olmo2", "mixtral", "cohere2", "phi", "stablelm")


@pytest.fixture(scope="module")
def library() -> None:
    """The code, compiled once."""
    if not native.begin() or not native.wait():
        pytest.skip("needs a C++ compiler")


def load(directory: Path, arch: str, **config: Any) -> tuple[ModelSpec, Any, LayerStack, Split]:
    spec = read_spec(str(tiny.save(arch, directory, **config)))
    split = Split.parse(spec.layers, "1:-2")
    return spec, *load_part(spec, split, "worker"), split


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runner]:
    """Makes the runner of a tiny model, fused if possible unless `fused` is False."""
    monkeypatch.setattr(linear, "LEAST_BYTES", 0)

    def make(arch: str = "llama", fused: bool = True, **config: Any) -> Runner:
        spec, model, stack, split = load(tmp_path / f"{arch}-{fused}", arch, **config)
        return build_runner(stack, split, spec.text_config, KV_BYTES, pack_linears(model, stack, measure=fused))

    return make


class Twins:
    """The same sequences in a fused runner and in one that is not, over the same random states."""

    def __init__(self, one: Runner, other: Runner, seed: int = 0) -> None:
        self.runners = (one, other)
        self.rows: list[list[Any]] = [[], []]
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def add(self) -> None:
        for rows, runner in zip(self.rows, self.runners, strict=True):
            rows.append(runner.store.new_sequence())

    def fork(self, index: int) -> None:
        for rows in self.rows:
            rows.append(rows[index].fork())

    def truncate(self, index: int, tokens: int) -> None:
        for rows in self.rows:
            rows[index].truncate(tokens)

    def step(self, counts: dict[int, int], offset: int = 0) -> None:
        """Appends so many random tokens to sequences, in one forward, and compares the outputs."""
        width = self.runners[0].width
        states = {index: torch.randn(count, width, generator=self.generator) for index, count in counts.items()}
        outputs = []
        for rows, runner in zip(self.rows, self.runners, strict=True):
            begins = {index: rows[index].length + offset for index in counts}
            runs = [
                TokenRun(rows[index], states[index], range(begins[index], begins[index] + count))
                for index, count in counts.items()
            ]
            outputs.append(torch.cat(runner.run(runs)))
        assert tiny.deviation(*outputs) < 5e-6


@pytest.mark.numbers
@pytest.mark.parametrize("arch", USUAL)
def test_fused_layers_compute_what_layers_compute(arch: str, runner: Callable[..., Runner], library: None) -> None:
    fused, plain = runner(arch), runner(arch, fused=False)
    assert (fused.executor.fusion, plain.executor.fusion) == ("fused", None)
    twins = Twins(fused, plain)
    for _ in range(3):
        twins.add()
    # A prompt over several pages and blocks, another one beside a token, and many tokens at once.
    twins.step({0: 37})
    twins.step({0: 1, 1: 19})
    twins.step({2: 70, 0: 1, 1: 3})
    for _ in range(25):
        match twins.random.choice(("step", "step", "step", "fork", "truncate")):
            case "fork" if len(twins.rows[0]) < 9:
                twins.fork(twins.random.randrange(len(twins.rows[0])))
            case "truncate":
                index = twins.random.randrange(len(twins.rows[0]))
                twins.truncate(index, twins.random.randint(0, twins.rows[0][index].length))
            case _:
                chosen = twins.random.sample(range(len(twins.rows[0])), twins.random.randint(1, 3))
                twins.step({index: twins.random.choice((1, 1, 1, 2, 5, 17)) for index in chosen})


@pytest.mark.numbers
@pytest.mark.parametrize("config", [{"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}])
def test_activations_are_recognized(config: dict[str, Any], runner: Callable[..., Runner], library: None) -> None:
    twins = Twins(runner(**config), runner(fused=False, **config))
    assert twins.runners[0].executor.fusion == "fused"
    twins.add()
    twins.step({0: 20})


def test_positions_beyond_the_table_are_looked_up(
    runner: Callable[..., Runner], library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_layers, "TABLE_POSITIONS", 64)
    monkeypatch.setattr(fused_layers, "MOST_POSITIONS", 128)
    twins = Twins(runner(), runner(fused=False))
    twins.add()
    for offset in (60, 125, 200):
        twins.step({0: 9}, offset)


@pytest.mark.parametrize("arch", UNUSUAL)
def test_layers_of_other_shapes_run_as_before(arch: str, tmp_path: Path) -> None:
    _, model, stack, _ = load(tmp_path, arch)
    linears = [module for module in model.modules() if type(module) is torch.nn.Linear]
    assert not sketch_layers(stack, linears)


def test_a_guess_that_gives_another_output_is_refused(
    runner: Callable[..., Runner], library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NoPE layers are handed rotary embeddings, and do not use them."""
    assert runner("smollm3").executor.fusion is None
    monkeypatch.setattr(fusing, "FUSED_TOLERANCE", 0.0)
    assert runner("qwen3").executor.fusion is None


def test_sequences_go_on_when_the_code_is_compiled(
    runner: Callable[..., Runner], library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = native.library()
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        late = runner()
        assert late.executor.fusion == "compiling"
        twins = Twins(late, runner(fused=False))
        twins.add()
        twins.step({0: 21})
        assert late.executor.fusion == "compiling"
    assert native.library() is compiled
    twins.step({0: 1})
    assert late.executor.fusion == "fused"
    twins.step({0: 2})


def test_what_the_code_does_not_compute_goes_through_the_layers(
    runner: Callable[..., Runner], library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = runner()
    assert isinstance(fused.executor, PackedExecutor)
    monkeypatch.setattr(fused.executor.fused, "run", lambda *_: pytest.fail("computed in one call"))
    states = torch.randn(3, fused.width)
    row = fused.store.new_sequence()
    additions = {fused.layers.split.first: torch.randn(3, fused.width)}
    fused.run([TokenRun(row, states, range(3), additions=additions)])
    fused.run([TokenRun(row, states, range(3, 6), spans=[(0, 2)])])
    fused.run([TokenRun(row, states, (6, 7, 7), parents=(-1, 0, 0))])
    with pytest.raises(pytest.fail.Exception):
        fused.run([TokenRun(row, states, range(6, 9))])


# --- the compiler ---------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has loaded and compiled nothing, with an empty cache."""
    for name, value in (("_library", None), ("_compiling", None), ("_failed", False)):
        monkeypatch.setattr(native, name, value)
    monkeypatch.setenv("LAMBDA_SPLIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


def test_a_second_start_finds_what_the_first_one_compiled(
    fresh: Path, library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.begin()
    assert native.wait()
    assert len(list(fresh.iterdir())) == 1
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_compiling", None)
    monkeypatch.setattr(native, "compiler", lambda: None)
    assert native.begin()
    assert native.library() is not None


def test_a_spoilt_file_is_compiled_again(fresh: Path, library: None) -> None:
    fresh.mkdir(parents=True, mode=0o700)
    file = fresh / native.code_name()
    file.write_bytes(b"not a library")
    assert native.begin()
    assert native.wait()
    assert file.stat().st_size > 1000


def test_without_a_compiler_layers_run_as_before(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not native.begin()
    assert runner().executor.fusion is None


def test_a_compiler_that_fails_is_not_waited_for(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    monkeypatch.setenv("CXX", "false")
    assert native.begin()
    assert not native.wait()
    assert native.failed()
    assert not list(fresh.iterdir())
    assert runner().executor.fusion is None

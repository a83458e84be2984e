"""The way to CUDA, where there is none: FlashAttention's plans and the graphs of decoding batches.

The kernel and the capture are CUDA's own. What surrounds them is run here with a plain kernel of the same contract
in place of torch's, and with graphs that compute anew each time they are replayed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from split_common.engine import flash, graphs
from split_common.engine import runner as runner_module
from split_common.engine.graphs import DecodeGraphs
from split_common.engine.pool import PagePool
from split_common.engine.rows import Run
from split_common.engine.runner import Runner
from test_engine import EngineMachine, make_oracle, make_runner

PAGE_TOKENS = 16


def reference_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents, one sequence at a time."""
    outputs = []
    groups = query.shape[1] // key.shape[2]
    assert enable_gqa == (groups > 1)
    for row, (begin, end) in enumerate(zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False)):
        length = int(seqused_k[row])
        assert end - begin <= max_q
        assert length <= max_k
        keys, values = (pages[block_table[row].long()].flatten(0, 1)[:length] for pages in (key, value))
        keys, values = (each.repeat_interleave(groups, 1).transpose(0, 1) for each in (keys, values))
        at = torch.arange(length - (end - begin), length)[:, None]
        seen = torch.arange(length)[None] <= at + window_size[1]
        if window_size[0] >= 0:
            seen &= torch.arange(length)[None] >= at - window_size[0]
        weights = (query[begin:end].transpose(0, 1) @ keys.transpose(1, 2)) * scale
        outputs.append((weights.masked_fill(~seen, float("-inf")).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Runners that are made meanwhile take the way to CUDA; the sizes of the graphs that they make."""
    made: list[tuple[int, int]] = []

    def capture(compute: Any) -> Any:
        compute()
        return compute

    make = graphs.DecodeGraph.__init__

    def count(self: Any, *args: Any) -> None:
        made.append(args[6:8])
        make(self, *args)

    monkeypatch.setattr(graphs.DecodeGraph, "__init__", count)
    monkeypatch.setattr(flash, "varlen_attn", reference_varlen_attn)
    monkeypatch.setattr(flash, "PAGE_TOKENS", PAGE_TOKENS)
    monkeypatch.setattr(flash.FlashAttention, "page_tokens", PAGE_TOKENS)
    monkeypatch.setattr(flash, "usable", lambda *_: True)
    monkeypatch.setattr(runner_module, "capture_cuda", capture)
    return made


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "gpt2"])
def test_any_mix_of_steps(
    arch: str, as_on_cuda: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_runner(tmp_path / "engine", arch)
    assert engine.backend.name == "flash"
    oracle = make_oracle(tmp_path / "oracle", arch, monkeypatch)
    machine = type(f"{arch}Machine", (EngineMachine,), {"engine": engine, "oracle": oracle})
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=12, stateful_step_count=30, deadline=None, database=None, derandomize=True),
    )
    assert len(as_on_cuda) > 1


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("arch", ["gemma2", "gpt_oss"])
def test_what_flash_attention_cannot_express_is_packed_with_the_other_backend(arch: str, tmp_path: Path) -> None:
    engine = make_runner(tmp_path, arch)
    assert (engine.separate_because, engine.backend.name) == (None, "sdpa")


def decode(engine: Runner, rows: list[Any], generator: torch.Generator) -> list[torch.Tensor]:
    runs = [Run(row, torch.randn(1, engine.width, generator=generator), [row.length]) for row in rows]
    return engine.run(runs)


def test_graphs_are_few_and_filled_up_with_rows_that_touch_nobody(
    as_on_cuda: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_runner(tmp_path / "engine", "llama")
    generator = torch.Generator().manual_seed(1)
    rows = [engine.store.new_row() for _ in range(5)]
    for row in rows:
        engine.run([Run(row, torch.randn(3, engine.width, generator=generator), range(3))])
    store = engine.store
    assert isinstance(store, PagePool)
    idle = store.new_row()
    engine.run([Run(idle, torch.randn(4, engine.width, generator=generator), range(4))])
    before = [keys[torch.from_numpy(idle.slots())].clone() for keys, _ in store.layers.values()]
    for count in (5, 3, 1, 5, 2, 4):
        decode(engine, rows[:count], generator)
    assert sorted(as_on_cuda) == [(1, 1), (2, 1), (4, 1), (8, 1)]
    after = [keys[torch.from_numpy(idle.slots())] for keys, _ in store.layers.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert store.free == store.pages - 7  # six rows of one page, and that of nobody


def test_without_graphs_decoding_goes_on(
    as_on_cuda: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(runner_module, "capture_cuda", fail)
    engine = make_runner(tmp_path / "engine", "llama")
    oracle = make_oracle(tmp_path / "oracle", "llama", monkeypatch)
    row, other = engine.store.new_row(), oracle.store.new_row()
    for _ in range(3):
        states = torch.randn(1, engine.width)
        (got,), (wanted,) = (
            each.run([Run(at, states, [at.length])]) for each, at in ((engine, row), (oracle, other))
        )
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
    assert len(as_on_cuda) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2"])
def test_on_cuda_the_body_runs_packed_over_flash_attention_and_graphs(arch: str, tmp_path: Path) -> None:
    import tiny
    from split_common.part import load_part, plan
    from split_common.split import Split

    plan_ = plan(str(tiny.save(arch, tmp_path, hidden_size=128, num_attention_heads=4, num_key_value_heads=2)))
    split = Split.parse(plan_.layers, "1:-2")
    model, stack = load_part(plan_, split, "worker", dtype=torch.bfloat16)
    model.to("cuda")
    engine = Runner(stack, split, plan_.text_config, 1 << 28)
    assert engine.backend.name == "flash"
    assert isinstance(engine._graphs, DecodeGraphs)
    whole, parts = engine.store.new_row(), engine.store.new_row()
    states = torch.randn(20, engine.width)
    (wanted,) = engine.run([Run(whole, states, range(20))])
    got = engine.run([Run(parts, states[:8], range(8))])
    for position in range(8, 20):
        got += engine.run([Run(parts, states[position : position + 1], [position])])
    torch.testing.assert_close(torch.cat(got), wanted, atol=0.1, rtol=0.1)

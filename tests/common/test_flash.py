"""The way to CUDA, where there is none: FlashAttention's plans, compiled layers, graphs of decoding batches.

The kernels and the capture are CUDA's own. What surrounds them is run here with a plain kernel of the same contract
in place of torch's, with layers that torch.compile traces but makes no kernels for, and with graphs that compute
anew each time they are replayed. Tests of CUDA itself need a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_engine
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from test_engine import EngineMachine, make_oracle, make_runner

import tiny
from split_common.engine import compiled, flash, graphs, packed, probe
from split_common.engine.graphs import DecodeGraphs
from split_common.engine.packed import PackedExecutor
from split_common.engine.pool import PagePool
from split_common.engine.runner import Runner, build_runner
from split_common.engine.sequences import TokenRun
from split_common.engine.tuning import UNMEASURED, Tuning
from split_common.errors import ModelError
from split_common.models.loading import load_part, read_spec
from split_common.models.split import Split

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
        right = window_size[1] if window_size[1] >= 0 else length
        seen = torch.arange(length)[None] <= at + right
        if window_size[0] >= 0:
            seen &= torch.arange(length)[None] >= at - window_size[0]
        weights = (query[begin:end].transpose(0, 1) @ keys.transpose(1, 2)) * scale
        outputs.append((weights.masked_fill(~seen, float("-inf")).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


def reference_flash_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
    seqused_k: torch.Tensor,
) -> tuple[torch.Tensor, None]:
    """What torch 2.11's kernel does with keys and values that begin at `cu_seq_k`, each sequence by itself."""
    assert is_causal == ((window_size_left, window_size_right) == (-1, 0))
    pages = cu_seq_k[:-1, None] // PAGE_TOKENS + torch.arange(-(-max_k // PAGE_TOKENS), dtype=torch.int32)
    pages.clamp_(max=len(key) // PAGE_TOKENS - 1)
    output = reference_varlen_attn(
        query,
        key.view(-1, PAGE_TOKENS, *key.shape[1:]),
        value.view(-1, PAGE_TOKENS, *value.shape[1:]),
        cu_seq_q,
        None,
        max_q,
        max_k,
        scale=scale,
        window_size=(window_size_left, window_size_right),
        enable_gqa=query.shape[1] != key.shape[1],
        seqused_k=seqused_k,
        block_table=pages,
    )
    return output, None


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Runners that are made meanwhile take the way to CUDA; the sizes of the graphs that they make."""
    made: list[tuple[int, int]] = []

    def capture(compute: Any) -> Any:
        compute()
        return compute

    make = graphs.DecodeGraph.__init__

    def count(self: Any, *args: Any, **options: Any) -> None:
        made.append((options["rows"], options["pages"]))
        make(self, *args, **options)

    monkeypatch.setattr(graphs.DecodeGraph, "__init__", count)
    monkeypatch.setattr(probe, "compile_layers", lambda _: None)
    monkeypatch.setattr(flash, "varlen_attn", reference_varlen_attn)
    monkeypatch.setattr(flash, "flash_attention_forward", reference_flash_forward)
    monkeypatch.setattr(flash, "FLASH_PAGE_TOKENS", PAGE_TOKENS)
    monkeypatch.setattr(flash.FlashAttention, "page_tokens", PAGE_TOKENS)
    monkeypatch.setattr(flash, "usable", lambda *_: True)
    monkeypatch.setattr(packed, "new_capture", lambda: capture)
    return made


def compile_too(monkeypatch: pytest.MonkeyPatch, backend: Any = "eager") -> None:
    """Has layers traced by torch.compile, which takes seconds, without inductor and its options."""
    torch.compiler.reset()
    # On CUDA one token is not padded.
    monkeypatch.setattr(Tuning, "padded", lambda _, rows: rows)
    monkeypatch.setattr(test_engine, "pack_linears", lambda *_: UNMEASURED)
    compile_ = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **given: compile_(function, backend=backend, dynamic=given["dynamic"]),
    )
    monkeypatch.setattr(probe, "compile_layers", compiled.compile_layers)


@pytest.mark.parametrize(
    ("arch", "reads_pages"),
    [
        pytest.param("llama", True, marks=pytest.mark.numbers),
        pytest.param("mistral", True, marks=pytest.mark.long),
        ("mistral", False),
        pytest.param("qwen2", True, marks=pytest.mark.long),
        ("gpt2", True),
    ],
)
def test_any_mix_of_steps(
    arch: str, reads_pages: bool, as_on_cuda: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "READS_PAGES", reads_pages)
    if arch == "qwen2":
        compile_too(monkeypatch)
    engine = make_runner(tmp_path / "engine", arch)
    assert engine.executor.attention == "flash"
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
    assert (engine.unpacked_because, engine.executor.attention) == (None, "sdpa")


@pytest.mark.long
def test_all_layers_share_what_is_compiled(
    as_on_cuda: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_too(monkeypatch)
    graphs_of: list[int] = []
    for layers in (4, 6):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        engine = make_runner(tmp_path / str(layers), "llama", num_hidden_layers=layers)
        assert engine.compiled
        graphs_of.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs_of[0] == graphs_of[1] > 0


def test_layers_that_cannot_be_compiled_run_as_they_are(
    as_on_cuda: list[tuple[int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> Any:
        raise FileNotFoundError("no C compiler")

    compile_too(monkeypatch, fail)
    engine = make_runner(tmp_path, "llama")
    assert "no C compiler" in caplog.text
    assert not engine.compiled
    assert not any("forward" in vars(layer) for layer in engine.layers.stack.slots)
    generator = torch.Generator().manual_seed(1)
    row = engine.store.new_sequence()
    assert decode(engine, [row], generator)[0].isfinite().all()
    row.free()
    assert engine.store.free == engine.store.pages - 1


def decode(engine: Runner, rows: list[Any], generator: torch.Generator) -> list[torch.Tensor]:
    runs = [TokenRun(row, torch.randn(1, engine.width, generator=generator), [row.length]) for row in rows]
    return engine.run(runs)


@pytest.mark.numbers
def test_graphs_are_few_and_filled_up_with_rows_that_touch_nobody(
    as_on_cuda: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_runner(tmp_path / "engine", "llama")
    generator = torch.Generator().manual_seed(1)
    rows = [engine.store.new_sequence() for _ in range(5)]
    for row in rows:
        engine.run([TokenRun(row, torch.randn(3, engine.width, generator=generator), range(3))])
    store = engine.store
    assert isinstance(store, PagePool)
    idle = store.new_sequence()
    engine.run([TokenRun(idle, torch.randn(4, engine.width, generator=generator), range(4))])
    before = [keys[torch.from_numpy(idle.slots())].clone() for keys, _ in store.layers.values()]
    for count in (5, 3, 1, 5, 2, 4):
        decode(engine, rows[:count], generator)
    assert sorted(as_on_cuda) == [(1, 1), (2, 1), (4, 1), (8, 1)]
    after = [keys[torch.from_numpy(idle.slots())] for keys, _ in store.layers.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert store.free == store.pages - 7  # six rows of one page, and that of nobody


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), 1),
        (torch.OutOfMemoryError("all used"), 0),
    ],
)
def test_a_size_that_cannot_be_captured_runs_without(
    error: Exception,
    left: int,
    as_on_cuda: list[tuple[int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def capture(compute: Any) -> Any:
        if len(as_on_cuda) == 2:
            raise error
        compute()
        return compute

    monkeypatch.setattr(packed, "new_capture", lambda: capture)
    engine = make_runner(tmp_path / "engine", "llama")
    oracle = make_oracle(tmp_path / "oracle", "llama", monkeypatch)
    assert isinstance(engine.executor, PackedExecutor)
    graphs_made = engine.executor.graphs
    assert graphs_made is not None
    rows = [(each.store.new_sequence(), each.store.new_sequence()) for each in (engine, oracle)]
    for count in (1, 2, 2):
        states = [torch.randn(1, engine.width) for _ in range(count)]
        got, wanted = (
            each.run([TokenRun(row, state, [row.length]) for row, state in zip(of, states, strict=False)])
            for each, of in zip((engine, oracle), rows, strict=True)
        )
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
    assert as_on_cuda == [(1, 1), (2, 1)]
    assert [graph for graph in graphs_made._graphs.values() if graph is not None][left:] == []
    assert caplog.text.count("run without a CUDA graph") == 1


def test_layers_that_are_wrong_for_one_token_alone_run_as_they_are(
    as_on_cuda: list[tuple[int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def halving(layers: Any) -> None:
        for layer in layers:

            def forward(hidden: torch.Tensor, *args: Any, original: Any = layer.forward, **kwargs: Any) -> Any:
                output = original(hidden, *args, **kwargs)
                return output * 0.5 if hidden.shape[1] == 1 else output

            layer.forward = forward

    monkeypatch.setattr(probe, "compile_layers", halving)
    monkeypatch.setattr(Tuning, "padded", lambda _, rows: rows)
    assert not make_runner(tmp_path, "llama").compiled
    assert "their output differs" in caplog.text


@pytest.mark.usefixtures("as_on_cuda")
def test_a_pool_of_one_page_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_engine, "KV_BYTES", 1 << 13)
    with pytest.raises(ModelError, match="at least 12,288 bytes are needed"):
        make_runner(tmp_path, "llama")


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2"])
def test_on_cuda_the_body_runs_packed_over_flash_attention_and_graphs(arch: str, tmp_path: Path) -> None:
    engine = on_cuda(arch, tmp_path, torch.bfloat16)
    assert engine.executor.attention == "flash"
    assert isinstance(engine.executor, PackedExecutor)
    graphs_made = engine.executor.graphs
    assert isinstance(graphs_made, DecodeGraphs)
    assert engine.compiled
    check_decoding(engine, tolerance=0.1)
    assert len(graphs_made._graphs) > 2


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_oss"])
def test_on_cuda_the_body_runs_packed_in_full_precision(arch: str, tmp_path: Path) -> None:
    engine = on_cuda(arch, tmp_path, torch.float32)
    assert engine.executor.attention == "sdpa"
    check_decoding(engine, tolerance=1e-3)


def on_cuda(arch: str, directory: Path, dtype: torch.dtype) -> Runner:
    wide = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6}
    spec = read_spec(str(tiny.save(arch, directory, **wide)))
    split = Split.parse(spec.layers, "1:-2")
    model, stack = load_part(spec, split, "worker", dtype=dtype)
    model.to("cuda")
    return build_runner(stack, split, spec.text_config, 1 << 28)


def check_decoding(engine: Runner, tolerance: float) -> None:
    """Rows that decode together, one of them over several pages, give what one forward each gives."""
    generator = torch.Generator().manual_seed(0)
    for lengths in ([20], [20, 33, 300], [9, 30, 8, 12, 700]):
        wanted, got, rows = [], [], []
        for length in lengths:
            states = torch.randn(length, engine.width, generator=generator)
            whole = engine.store.new_sequence()
            wanted += [output[-6:] for output in engine.run([TokenRun(whole, states, range(length))])]
            whole.free()
            rows.append((engine.store.new_sequence(), states))
        engine.run([TokenRun(row, states[:-6], range(len(states) - 6)) for row, states in rows])
        # One more, which shares its pages, and is scattered as soon as it grows.
        rows.append((rows[-1][0].fork(), rows[-1][1]))
        wanted.append(wanted[-1])
        for step in range(-6, 0):
            got.append(
                engine.run(
                    [TokenRun(row, states[len(states) + step][None], [len(states) + step]) for row, states in rows]
                )
            )
        for index, (row, _) in enumerate(rows):
            decoded, whole = torch.cat([outputs[index] for outputs in got]).float(), wanted[index].float()
            assert (decoded - whole).norm() < tolerance * whole.norm(), lengths
            row.free()

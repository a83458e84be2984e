"""Sessions: a cache that transformers crops, reorders, selects, copies and drops, with its keys on a worker."""

from __future__ import annotations

import copy
import gc
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import tiny
from fleet import KV_BYTES, joined, running_broker, start_worker
from split_common.engine.sequences import KVSequence, TokenRun
from split_common.errors import Busy, Malformed, NonFinite, OutOfOrder, PromptTooLong, SessionLost
from split_common.models.loading import read_spec
from split_common.models.split import Split
from split_common.models.tensors import check_finite
from split_common.protocol import headers, payloads
from split_device import SplitModelForCausalLM
from split_device.sessions.client import PATIENCE
from split_worker.bodies.held import HeldArrays, ImageState
from split_worker.bodies.language import LanguageBody, Rows
from split_worker.bodies.loading import load_language_body
from split_worker.limits import WorkerLimits
from split_worker.sessions import MAX_WAITING, Session, SessionTable
from split_worker.worker import Worker
from wiretap import LATE, SOON, record_requests

Model = Any

pytestmark = pytest.mark.usefixtures("patient_queue")

PROMPT = torch.tensor([[5, 17, 33, 4, 61, 12, 80, 7, 29, 44]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "suppress_tokens": [0]}


@pytest.fixture(scope="module")
def broker(transport: str) -> Iterator[str]:
    with running_broker() as running:
        yield running.address


@pytest.fixture(scope="module")
def llama(broker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Worker]]:
    with joined(broker, tiny.save("llama", tmp_path_factory.mktemp("llama"))) as pair:
        yield pair


@pytest.fixture(scope="module")
def full() -> Model:
    return tiny.build("llama")


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + LATE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def held(worker: Worker, sessions: int) -> bool:
    """Whether the worker comes to hold this many sessions."""
    gc.collect()
    return wait_for(lambda: len(worker._sessions) == sessions)


def test_a_worker_tells_how_it_does(broker: str, tmp_path: Path) -> None:
    with joined(broker, tiny.save("llama", tmp_path)) as (model, worker):
        idle = worker.facts()
        assert {name for name, value in idle.items() if value} == {"kv_tokens"}
        cache = DynamicCache()
        model.generate(PROMPT, past_key_values=cache, **GREEDY)
        busy = worker.facts()
        assert (busy["sessions"], busy["steps"], busy["forwards"], busy["rows_per_forward"]) == (1, 6, 6, 1.0)
        assert busy["tokens"] == PROMPT.shape[1] + 5
        assert PROMPT.shape[1] + 5 <= busy["kv_tokens_used"] < busy["kv_tokens"]
        assert busy["tokens_per_second"] > 0
        assert busy["queue_ms"] > 0
        del cache
        assert held(worker, 0)
        assert wait_for(lambda: worker.facts()["kv_tokens_used"] == 0)


# --- what happens to the cache -----------------------------------------------------------------------------


class Walk:
    """One model and its cache, to which random things are done. Two models with one seed are done the same to."""

    def __init__(self, model: Model, seed: int, windowed: bool) -> None:
        self.model = model
        self.random = random.Random(seed)
        self.windowed = windowed
        self.cache = DynamicCache(config=model.config)
        if hasattr(self.cache, "activate_past_recording"):
            self.cache.activate_past_recording()
        self.mask = torch.ones(self.random.randint(1, 3), 0, dtype=torch.long)
        self.append(self.random.randint(1, 12))

    def append(self, tokens: int) -> torch.Tensor:
        rows, columns = self.mask.shape
        numbers = [self.random.randrange(1, tiny.VOCABULARY) for _ in range(rows * tokens)]
        new = torch.ones(rows, tokens, dtype=torch.long)
        if not self.windowed:
            for row in range(rows):
                gap = self.random.randrange(tokens)
                new[row, :gap] = 0
        self.mask = torch.cat([self.mask, new], 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        with torch.no_grad():
            logits = self.model(
                torch.tensor(numbers).view(rows, tokens),
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
            ).logits
        if self.windowed:
            # transformers' own windows can be cut back once after each step, by what it added.
            self.crop(self.random.randint(0, tokens) if columns else 0)
        return logits[new == 1]

    def crop(self, count: int) -> None:
        self.cache.crop(-count)
        self.mask = self.mask[:, : self.mask.shape[1] - count]

    def change(self) -> None:
        rows, columns = self.mask.shape
        match self.random.choice(["crop", "crop", "reorder", "select", "repeat", "copy", "leave a copy"]):
            case "crop" if not self.windowed:
                self.crop(self.random.randrange(columns))
            case "reorder":
                order = torch.tensor([self.random.randrange(rows) for _ in range(rows)])
                self.cache.reorder_cache(order)
                self.mask = self.mask[order]
            case "select":
                some = torch.tensor(sorted(self.random.sample(range(rows), self.random.randint(1, rows))))
                self.cache.batch_select_indices(some)
                self.mask = self.mask[some]
            case "repeat" if rows < 4:
                self.cache.batch_repeat_interleave(2)
                self.mask = self.mask.repeat_interleave(2, 0)
            case "copy":
                self.cache = copy.deepcopy(self.cache)
            case "leave a copy":
                kept = self.cache, self.mask
                self.cache = copy.deepcopy(self.cache)
                self.append(2)
                self.cache, self.mask = kept


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def pair(
    request: pytest.FixtureRequest, broker: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Model, Model]]:
    with joined(broker, tiny.save(request.param, tmp_path_factory.mktemp("walk")), 1, 2) as (model, _):
        yield tiny.build(request.param), model


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_done_to_the_cache(pair: tuple[Model, Model], seed: int) -> None:
    """Same logits as the unsplit model's after each step of a random walk."""
    windowed = pair[0].config.model_type != "llama"
    theirs, ours = (Walk(model, seed, windowed) for model in pair)
    for _ in range(8):
        for walk in (theirs, ours):
            for _ in range(walk.random.randrange(3)):
                walk.change()
        tokens = theirs.random.choice([1, 1, 2, 9])
        assert ours.random.choice([1, 1, 2, 9]) == tokens
        assert ours.mask.tolist() == theirs.mask.tolist()
        assert ours.cache.get_seq_length() == theirs.cache.get_seq_length()
        assert torch.allclose(ours.append(tokens), theirs.append(tokens), atol=2e-4, rtol=1e-4)


def test_changes_cost_no_message(llama: tuple[Model, Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = llama
    cache = DynamicCache()
    with torch.no_grad():
        model(PROMPT.repeat(2, 1), past_key_values=cache)
    sent = record_requests(monkeypatch)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    cache.crop(-3)
    assert sent == []


def test_crop_to_a_length(llama: tuple[Model, Worker]) -> None:
    """As older versions of transformers ask for it."""
    model, _ = llama
    cache = DynamicCache()
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
    layer = cache.layers[2]
    layer.crop(100)
    assert layer.get_seq_length() == 10
    layer.crop(4)
    assert layer.get_seq_length() == 4
    layer.crop(-9)
    assert layer.get_seq_length() == 0


def test_every_layer_of_the_body_is_as_long_as_the_others(llama: tuple[Model, Worker], full: Model) -> None:
    caches = []
    for model in (llama[0], full):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(PROMPT, past_key_values=cache)
        caches.append(cache)
    ours, theirs = caches
    for index in range(tiny.LAYERS):
        assert ours.get_seq_length(index) == theirs.get_seq_length(index) == 10
        assert ours.get_mask_sizes(3, index) == theirs.get_mask_sizes(3, index)
        assert ours.get_max_length(index) == theirs.get_max_length(index)
    assert ours.is_sliding == theirs.is_sliding


def test_window_of_a_body_layer(pair: tuple[Model, Model]) -> None:
    caches = []
    for model in pair:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(PROMPT, past_key_values=cache)
        caches.append(cache)
    theirs, ours = caches
    assert ours.is_sliding == theirs.is_sliding
    for index in range(tiny.LAYERS):
        assert ours.get_mask_sizes(3, index) == theirs.get_mask_sizes(3, index)
        assert ours.get_max_length(index) == theirs.get_max_length(index)


# --- when the worker's memory is freed ---------------------------------------------------------------------


def test_session_ends_with_its_cache(llama: tuple[Model, Worker]) -> None:
    model, worker = llama
    assert held(worker, 0)
    cache = DynamicCache()
    model.generate(PROMPT, past_key_values=cache, **GREEDY)
    assert held(worker, 1)
    del cache
    assert held(worker, 0)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "no cache", "beams", "lookup"],
)
def test_generate_leaves_nothing_behind(llama: tuple[Model, Worker], options: dict[str, Any]) -> None:
    model, worker = llama
    model.generate(PROMPT, **GREEDY, **options)
    assert held(worker, 0)


def test_failed_step_leaves_nothing_behind(llama: tuple[Model, Worker]) -> None:
    model, worker = llama
    embeddings = torch.full((1, 3, 32), float("nan"))
    for use_cache in (True, False):
        with pytest.raises(NonFinite):
            model(inputs_embeds=embeddings, use_cache=use_cache)
    assert held(worker, 0)


def test_reset_ends_the_session_and_the_cache_can_be_used_again(llama: tuple[Model, Worker], full: Model) -> None:
    model, worker = llama
    cache = DynamicCache()
    first = model.generate(PROMPT, past_key_values=cache, **GREEDY)
    cache.reset()
    assert held(worker, 0)
    if cache.get_seq_length():
        pytest.skip("this version of transformers resets a dynamic cache to zeros, not to nothing")
    assert model.generate(PROMPT, past_key_values=cache, **GREEDY).tolist() == first.tolist()


def test_copies_are_sessions_of_their_own(llama: tuple[Model, Worker], full: Model) -> None:
    model, worker = llama
    cache = DynamicCache()
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
    twin = copy.deepcopy(cache)
    assert held(worker, 2)
    question = torch.cat([PROMPT, torch.tensor([[3, 9]])], 1)
    expected = full.generate(question, **GREEDY).tolist()
    assert model.generate(question, past_key_values=cache, **GREEDY).tolist() == expected
    del cache
    assert held(worker, 1)
    assert model.generate(question, past_key_values=twin, **GREEDY).tolist() == expected
    assert twin.get_seq_length() == len(expected[0]) - 1
    del twin
    assert held(worker, 0)


def test_copy_of_an_unused_cache_is_no_session(llama: tuple[Model, Worker]) -> None:
    model, worker = llama
    cache = DynamicCache(config=model.config)
    twin = copy.deepcopy(cache)
    model.generate(PROMPT, past_key_values=twin, **GREEDY)
    assert held(worker, 1)
    assert cache.get_seq_length() == 0


def test_closed_model_ends_its_sessions(broker: str, llama: tuple[Model, Worker], tmp_path: Path) -> None:
    with joined(broker, tiny.save("llama", tmp_path)) as (model, worker):
        caches = [DynamicCache(), DynamicCache()]
        for cache in caches:
            with torch.no_grad():
                model(PROMPT, past_key_values=cache)
        model.close()
        assert wait_for(lambda: len(worker._sessions) == len(llama[1]._sessions) == 0)


def test_cache_of_a_worker_that_is_gone(broker: str, tmp_path: Path) -> None:
    with joined(broker, tiny.save("qwen2", tmp_path), patience=0) as (model, worker), torch.no_grad():
        cache = DynamicCache()
        model(PROMPT, past_key_values=cache)
        worker.stop()
        with pytest.raises(SessionLost):
            model(PROMPT[:, :1], past_key_values=cache)


# --- the worker's side -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gemma2", "bloom"])
def body(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageBody:
    spec = read_spec(str(tiny.save(request.param, tmp_path_factory.mktemp("body"))))
    return load_language_body(spec, Split.from_head_tail(spec.layers, 1, 2), torch.device("cpu"), kv_bytes=KV_BYTES)


def states(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))


def step(*rows: payloads.Run, select: list[int] | None = None, width: int = 32) -> payloads.Step:
    return payloads.Step("float32", width, list(rows), select)


def run(start: int, count: int, row: int = 0) -> payloads.Run:
    return payloads.Run(row, start, list(range(start, start + count)))


def forward(body: LanguageBody, row: KVSequence, hidden: torch.Tensor, positions: list[int]) -> torch.Tensor:
    (output,) = body.runner.run([TokenRun(row, hidden, positions)])
    return output


def run_step(holder: Rows, body: LanguageBody, request: payloads.Step, hidden: torch.Tensor) -> torch.Tensor:
    holder.check(request, body.runner)
    runs = holder.begin(request, hidden, body.runner)
    try:
        output = torch.cat(body.runner.run(runs)) if runs else hidden
        check_finite(output)
    except Exception:
        holder.undo()
        raise
    holder.commit()
    return output


def session() -> Session[Rows]:
    return Session((b"device00", 1, 1, 0), "device-1", None, Rows())  # type: ignore[arg-type]


@pytest.mark.numbers
def test_row_is_cut_back_beyond_its_window(body: LanguageBody) -> None:
    """Twenty tokens and then back to five, as if the others had never been."""
    row, fresh = body.store.new_sequence(), body.store.new_sequence()
    forward(body, row, states(20), list(range(20)))
    row.truncate(5)
    assert row.length == 5
    forward(body, fresh, states(20)[:5], list(range(5)))
    ours, expected = (forward(body, cache, states(12, 1), list(range(5, 17))) for cache in (row, fresh))
    assert tiny.deviation(ours, expected) < 1e-5


@pytest.mark.numbers
def test_forked_row_is_independent(body: LanguageBody) -> None:
    row = body.store.new_sequence()
    forward(body, row, states(10), list(range(10)))
    twin = row.fork()
    forward(body, row, states(3, 1), [10, 11, 12])
    row.truncate(2)
    assert twin.length == 10
    fresh = body.store.new_sequence()
    forward(body, fresh, states(10), list(range(10)))
    ours, expected = (forward(body, cache, states(1, 2), [10]) for cache in (twin, fresh))
    assert tiny.deviation(ours, expected) < 1e-5


@pytest.mark.numbers
def test_step_may_be_repeated(body: LanguageBody) -> None:
    """A step begins at a stated place, so that running it twice is running it once."""
    once, twice = Rows(), Rows()
    for each in (once, twice):
        run_step(each, body, step(run(0, 4)), states(4))
    for each in (once, twice, twice):
        output = run_step(each, body, step(run(4, 2)), states(2, 1))
        assert each.sequences[0].length == 6
    assert torch.equal(output, run_step(once, body, step(run(4, 2)), states(2, 1)))


def test_rows_of_a_step_do_not_see_each_other(body: LanguageBody) -> None:
    both, alone = Rows(), Rows()
    output = run_step(both, body, step(run(0, 4), run(0, 9, row=1)), torch.cat([states(4), states(9, 1)]))
    assert tiny.deviation(output[4:], run_step(alone, body, step(run(0, 9)), states(9, 1))) < 1e-5


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (step(run(5, 1)), Malformed),
        (step(run(3, 2), run(6, 1)), Malformed),
        (step(run(0, 1), select=[1]), Malformed),
        (step(run(0, 1), width=31), Malformed),
        (step(payloads.Run(0, 0, [256])), PromptTooLong),
        (step(run(0, 257)), PromptTooLong),
    ],
    ids=["gap", "gap in the step", "select", "width", "position", "length"],
)
def test_refused_step_changes_nothing(body: LanguageBody, bad: payloads.Step, error: type[Exception]) -> None:
    holder = Rows()
    run_step(holder, body, step(run(0, 4)), states(4))
    sequences = holder.sequences
    with pytest.raises(error):
        run_step(holder, body, bad, states(bad.tokens))
    assert holder.sequences is sequences
    assert [sequence.length for sequence in sequences] == [4]


def test_output_that_is_not_finite_moves_no_row(body: LanguageBody) -> None:
    """The device may send the same step again: its selection must not be applied twice."""
    holder = Rows()
    run_step(holder, body, step(run(0, 4), run(0, 4, row=1)), states(8))
    first, second = holder.sequences
    huge = torch.full((1, 32), 3e38)
    with pytest.raises(NonFinite):
        run_step(holder, body, step(run(4, 1), select=[1, 1]), huge * float("inf"))
    assert holder.sequences == [first, second]


def test_every_request_is_run_once_and_in_order() -> None:
    holder = session()
    assert holder.admit(0)
    assert not holder.admit(0)
    header = headers.Relay(b"device00", b"worker00", headers.RelayKind.REPLY, 1, seq=0)
    holder.answered((header, b"reply"))
    assert not holder.admit(0)
    assert holder.replies[0] == (header, b"reply")
    with pytest.raises(OutOfOrder):
        holder.admit(2)
    assert holder.admit(1)
    holder.forget(1)
    assert not holder.admit(0)
    assert not holder.replies


def test_waiting_requests_are_bounded() -> None:
    holder = session()
    for seq in range(MAX_WAITING):
        assert holder.admit(seq)
    with pytest.raises(OutOfOrder):
        holder.admit(MAX_WAITING)
    header = headers.Relay(b"device00", b"worker00", headers.RelayKind.REPLY, 1, seq=0)
    holder.answered((header, b"reply"))
    assert holder.admit(MAX_WAITING)


def test_a_session_may_have_any_number_of_requests() -> None:
    holder = session()
    for seq in range(3 * MAX_WAITING):
        assert holder.admit(seq)
        holder.answered((headers.Relay(b"device00", b"worker00", headers.RelayKind.REPLY, 1, seq=seq), b"reply"))
        holder.forget(seq)


class FakeChannel:
    peer = SimpleNamespace(name="device-1")

    def epoch_keys(self, *_: int) -> None:
        return None


def open_session(table: SessionTable, number: int, free: int = 10_000) -> Session[Rows]:
    return table.open((b"device00", 1, number, 0), FakeChannel(), Rows(), free)  # type: ignore[arg-type]


def store(sequence_tokens: int = 0) -> Any:
    """KV memory in which each sequence holds 16 tokens."""
    held = lambda sequences: 16 * len(sequences)  # noqa: E731
    return SimpleNamespace(sequence_tokens=sequence_tokens, held_by=held, freed_by=held)


def test_table_is_bounded_by_sessions_and_by_memory() -> None:
    table = SessionTable(WorkerLimits(max_sessions=2))
    assert table.room(10_000) == 2
    assert table.room(table.limits.growth) == 1
    # States take memory beside that of tokens.
    hybrid = SessionTable(WorkerLimits(max_sessions=2), store(sequence_tokens=1000))
    assert hybrid.room(hybrid.limits.growth + 999) == 0
    assert hybrid.room(hybrid.limits.growth + 1000) == 1
    first = open_session(table, 1)
    with pytest.raises(Busy, match="no room"):
        open_session(table, 2, free=100)
    open_session(table, 2)
    with pytest.raises(Busy, match="no room"):
        open_session(table, 3)
    table.close(first.id)
    assert (len(table), table.room(10_000)) == (1, 1)
    assert list(table.closed) == [first]


def test_sessions_without_kv_memory_are_bounded_by_their_number() -> None:
    table, held = SessionTable(WorkerLimits(max_sessions=2)), HeldArrays(10)
    assert table.room(None) == 2
    for number in (1, 2):
        opened = table.open((b"device00", 1, number, 0), FakeChannel(), ImageState(held), None)  # type: ignore[arg-type]
        assert not opened.state.holds_memory
    with pytest.raises(Busy, match="no room"):
        table.open((b"device00", 1, 3, 0), FakeChannel(), ImageState(held), None)  # type: ignore[arg-type]


def test_the_newest_session_gives_way_unless_one_is_idle() -> None:
    table = SessionTable(store=store())
    sessions = [open_session(table, number) for number in (1, 2, 3)]
    for each in sessions:
        each.state.sequences = [SimpleNamespace()]  # type: ignore[list-item]
    assert table.victims(sessions[0]) == [sessions[2]]
    assert not table.victims(sessions[2])
    sessions[0].used -= table.limits.evict_after + 1
    assert table.victims(sessions[2]) == [sessions[0]]


def test_idle_sessions_are_freed() -> None:
    table = SessionTable(WorkerLimits(max_sessions=1, idle_timeout=10))
    first = open_session(table, 1)
    first.used -= 11
    second = open_session(table, 2)
    assert table.get(first.id) is None
    assert table.get(second.id) is second


def test_full_worker_is_waited_for_and_then_reported(broker: str, tmp_path: Path) -> None:
    checkpoint = tiny.save("qwen3", tmp_path)
    worker = start_worker(checkpoint, broker, limits=WorkerLimits(max_sessions=1))
    try:
        with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker, patience=0.5) as model:
            cache = DynamicCache()
            expected = tiny.build("qwen3").generate(PROMPT, **GREEDY)
            model.generate(PROMPT, past_key_values=cache, **GREEDY)
            began = time.monotonic()
            with pytest.raises(Busy):
                model.generate(PROMPT, **GREEDY)
            assert time.monotonic() - began < SOON < PATIENCE
            del cache
            gc.collect()
            assert model.generate(PROMPT, **GREEDY).tolist() == expected.tolist()
    finally:
        worker.stop()


def test_replies_that_are_never_acknowledged_are_bounded() -> None:
    holder = session()
    for seq in range(2 * MAX_WAITING):
        assert holder.admit(seq)
        holder.answered((headers.Relay(b"device00", b"worker00", headers.RelayKind.REPLY, 1, seq=seq), b"reply"))
    assert list(holder.replies) == list(range(MAX_WAITING, 2 * MAX_WAITING))

"""A session's history: it can be replayed, its memory is bounded, and no other process can read it."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import tiny
from fleet import running_broker, start_worker
from split_common.errors import HistoryLost, SessionLost
from split_device import SplitModelForCausalLM
from split_device.sessions import history as history_module
from split_device.sessions import spill as spill_module
from split_device.sessions.history import History
from split_device.sessions.spill import SpillFile

WIDTH = 4
PROMPT = torch.tensor([[5, 17, 33, 4, 61, 12, 80, 7, 29, 44]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "suppress_tokens": [0]}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "BLOCK_BYTES", 512)
    monkeypatch.setattr(spill_module, "SLOT_BYTES", 100)


class Plain:
    """The same in the plainest way: one tensor for each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.largest: list[int] = []

    def append(self, states: torch.Tensor, positions: torch.Tensor) -> None:
        self.calls.append((states.clone(), positions.clone()))
        self.largest.append(int(positions.max()))

    def crop(self, columns: int) -> None:
        kept, left = [], columns
        for states, positions in self.calls:
            if left > 0:
                kept.append((states[:, :left], positions[:, :left]))
            left -= states.shape[1]
        self.calls = kept
        del self.largest[len(kept) :]

    def select(self, rows: list[int]) -> None:
        self.calls = [(states[rows], positions[rows]) for states, positions in self.calls]

    def clone(self) -> Plain:
        twin = Plain()
        twin.calls, twin.largest = list(self.calls), list(self.largest)
        return twin


def check(ours: History, theirs: Plain, by_call: bool, generator: torch.Generator) -> None:
    """Replaying either gives every row the same tokens; by call, in the same calls."""
    length = sum(states.shape[1] for states, _ in theirs.calls)
    batch = theirs.calls[0][0].shape[0] if theirs.calls else 0
    columns = torch.rand(batch, length, generator=generator) < 0.8
    parts = list(ours.replay(columns, by_call))
    rows: list[list[Any]] = [[] for _ in range(batch)]
    for runs, states, _ in parts:
        lengths = [len(run.positions) for run in runs]
        for run, part in zip(runs, torch.split(states, lengths), strict=True):
            assert run.start == len(rows[run.row])
            rows[run.row] += [(place, *token) for place, token in zip(run.positions, part.tolist(), strict=True)]
    begin, largest = 0, []
    wanted: list[list[Any]] = [[] for _ in range(batch)]
    for (states, positions), most in zip(theirs.calls, theirs.largest, strict=True):
        kept = columns[:, begin : begin + states.shape[1]]
        begin += states.shape[1]
        largest += [most] if bool(kept.any()) else []
        for row in range(batch):
            places, tokens = positions[row][kept[row]].tolist(), states[row][kept[row]].tolist()
            wanted[row] += [(place, *token) for place, token in zip(places, tokens, strict=True)]
    assert rows == wanted
    assert not by_call or [most for *_, most in parts] == largest


@given(st.integers(0, 2**32), st.sampled_from([0, 700, 10**9]), st.booleans())
@settings(max_examples=400, deadline=None)
def test_whatever_is_done_to_it(seed: int, memory: int, by_call: bool) -> None:
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    twins = [(History(memory), Plain())]
    batches = [choose.randrange(1, 5)]
    for _ in range(choose.randrange(1, 40)):
        index = choose.randrange(len(twins))
        ours, theirs = twins[index]
        length = sum(states.shape[1] for states, _ in theirs.calls)
        match choose.choice(["append"] * 6 + ["crop", "select", "clone", "drop"]):
            case "append":
                tokens = choose.choice([1, 1, 1, 2, 30, 100])
                states = torch.randn(batches[index], tokens, WIDTH, generator=generator)
                positions = torch.randint(0, 1000, (batches[index], tokens), generator=generator)
                for each in (ours, theirs):
                    each.append(states, positions)
            case "crop":
                columns = choose.choice([0, max(0, length - 1), max(0, length - 40), length])
                for each in (ours, theirs):
                    each.crop(columns)
            case "select":
                rows = [choose.randrange(batches[index]) for _ in range(choose.randrange(1, 5))]
                if theirs.calls:
                    batches[index] = len(rows)
                    for each in (ours, theirs):
                        each.select(rows)
            case "clone":
                twins.append((ours.clone(), theirs.clone()))
                batches.append(batches[index])
            case "drop" if len(twins) > 1:
                del twins[index], batches[index]
    for ours, theirs in twins:
        check(ours, theirs, by_call, generator)
        # The last blocks stay, and may still hold rows that were not selected: three of four.
        assert ours.resident <= memory + 4 * 1024


def test_memory_is_bounded_and_parts_are_few() -> None:
    history, moved = History(4096), 0
    for index in range(5000):
        history.append(torch.full((2, 1, WIDTH), float(index)), torch.full((2, 1), index))
        moved = max(moved, history.resident)
    assert moved <= 4096 + 1024
    whole = 5000 * 2 * WIDTH * 4
    assert len(history._parts) <= 2 * whole // 512 + 10
    rows, states, _ = next(iter(history.replay(torch.ones(2, 5000, dtype=torch.bool), False)))
    assert rows[0].positions[:3].tolist() == [0, 1, 2]
    assert states[0, 0] == 0.0


def test_a_step_copies_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each column is copied a few times in all; reordering, cropping and copying move nothing."""
    made = 0
    block = history_module.Block

    class Counted(block):  # type: ignore[misc, valid-type]
        def __init__(self, states: torch.Tensor, positions: torch.Tensor) -> None:
            nonlocal made
            made += states.nbytes
            super().__init__(states, positions)

    monkeypatch.setattr(history_module, "Block", Counted)
    monkeypatch.setattr(history_module, "BLOCK_BYTES", 64 * 1024)
    history = History()
    for index in range(4000):
        history.append(torch.zeros(4, 1, WIDTH), torch.full((4, 1), index))
        history.select([1, 0, 3, 3])
        history.clone().crop(index // 2)
    assert made < 4000 * 64 * 14


def test_the_file_is_nameless_encrypted_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    history = History(0)
    states = torch.arange(400.0).view(1, 100, WIDTH)
    for _ in range(3):
        history.append(states, torch.arange(100)[None])
    assert history.resident <= 1024
    assert list(tmp_path.iterdir()) == []
    file = history._file
    assert file is not None
    size = os.fstat(file._file.fileno()).st_size
    written = os.pread(file._file.fileno(), size, 0)
    assert size > 2000
    assert bytes(memoryview(states[0, 3:5].numpy()).cast("B")) not in written
    nonces = [nonce for nonce, _ in file._written.values()]
    assert len(set(nonces)) == len(nonces)
    for _ in range(20):
        history.crop(50)
        history.append(states, torch.arange(100)[None])
        history.append(states, torch.arange(100)[None])
    assert os.fstat(file._file.fileno()).st_size < 2 * size


def test_what_was_changed_or_swapped_in_the_file_is_not_taken() -> None:
    file = SpillFile()
    first, second = file.write(memoryview(b"a" * 250)), file.write(memoryview(b"b" * 250))
    assert (bytes(file.read(first)), bytes(file.read(second))) == (b"a" * 250, b"b" * 250)
    handle, size = file._file.fileno(), file._size
    old = os.pread(handle, size, first[0] * size)
    file.release(first)
    assert sorted(file.write(memoryview(b"c" * 250))) == sorted(first)
    for damage in (old, os.pread(handle, size, second[0] * size), bytes(size)):
        os.pwrite(handle, damage, first[0] * size)
        with pytest.raises(Exception, match="authentication"):
            file.read(first)
    os.ftruncate(handle, 0)
    with pytest.raises(Exception, match="authentication"):
        file.read(second)


def test_what_is_replayed_does_not_show_the_steps_it_was_made_of() -> None:
    sizes, states, places = [], torch.arange(150.0).repeat(WIDTH, 1).T[None], torch.arange(150)[None]
    for lengths in ([150], [1] * 150, [31, *[5, 1, 16] * 6], [149, 1], [100, *[7] * 9]):
        history, begin = History(0), 0
        for length in lengths:
            end = min(150, begin + length)
            # A wrong draft, which is taken back.
            history.append(*(torch.cat([each[:, begin:end], each[:, :3]], 1) for each in (states, places)))
            history.crop(end)
            begin = end
        if begin < 150:
            history.append(states[:, begin:], places[:, begin:])
        parts = list(history.replay(torch.ones(1, 150, dtype=torch.bool), False))
        assert torch.equal(torch.cat([packed for _, packed, _ in parts]), states[0])
        sizes.append([len(packed) for _, packed, _ in parts])
    assert sizes == [[32, 32, 32, 32, 22]] * len(sizes)


def full_disk(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_when_the_history_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(0)
    history.append(torch.zeros(1, 100, WIDTH), torch.zeros(1, 100, dtype=torch.long))
    monkeypatch.setattr(os, "pwrite", full_disk)
    history.append(torch.zeros(1, 100, WIDTH), torch.zeros(1, 100, dtype=torch.long))
    history.select([0, 0])
    history.crop(150)
    history.append(torch.zeros(2, 1, WIDTH), torch.zeros(2, 1, dtype=torch.long))
    assert history.resident == 0
    for each in (history, history.clone()):
        with pytest.raises(HistoryLost, match=r"No space left on device.*TMPDIR"):
            list(each.replay(torch.ones(2, 151, dtype=torch.bool), False))


# --- with a model ------------------------------------------------------------------------------------------

MODES: dict[str, Any] = {
    "greedy": lambda model: model.generate(PROMPT, **GREEDY),
    "beams": lambda model: model.generate(PROMPT, num_beams=3, num_return_sequences=2, **GREEDY),
    "lookup": lambda model: model.generate(PROMPT.repeat(1, 2), prompt_lookup_num_tokens=4, **GREEDY),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_spilled_history_is_replayed(mode: str, tmp_path: Path) -> None:
    wanted = MODES[mode](tiny.build("llama"))
    checkpoint = tiny.save("llama", tmp_path)
    with (
        running_broker() as broker,
        SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address, history_memory=0) as model,
    ):
        workers = [start_worker(checkpoint, broker.address)]
        calls = iter(range(10**6))

        def strike(*_: Any) -> None:
            if next(calls) in {3, 9, 10}:
                workers.append(start_worker(checkpoint, broker.address))
                workers[-2].stop()

        model.register_forward_pre_hook(strike)
        try:
            assert torch.equal(MODES[mode](model), wanted)
            assert model.traffic["replays"] == 3
        finally:
            workers[-1].stop()


def test_a_generation_with_a_spilled_history_is_resumed_after_an_error(tmp_path: Path) -> None:
    wanted = tiny.build("llama").generate(PROMPT, **GREEDY)
    checkpoint = tiny.save("llama", tmp_path)
    with (
        running_broker() as broker,
        SplitModelForCausalLM.from_pretrained(
            checkpoint, broker=broker.address, history_memory=0, patience=0.3
        ) as model,
        torch.no_grad(),
    ):
        worker = start_worker(checkpoint, broker.address)
        cache = DynamicCache(config=model.config)
        model(PROMPT[:, :-1], past_key_values=cache)
        worker.stop()
        with pytest.raises(SessionLost):
            model.generate(PROMPT, past_key_values=cache, **GREEDY)
        worker = start_worker(checkpoint, broker.address)
        assert cache.layers[2]._history._file is not None
        assert torch.equal(model.generate(PROMPT, past_key_values=cache, **GREEDY), wanted)
        worker.stop()


def test_a_generation_ends_on_a_full_disk_if_its_worker_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tiny.build("llama").generate(PROMPT, **GREEDY)
    checkpoint = tiny.save("llama", tmp_path)
    with (
        running_broker() as broker,
        SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address, history_memory=0) as model,
    ):
        worker = start_worker(checkpoint, broker.address)
        monkeypatch.setattr(os, "pwrite", full_disk)
        cache = DynamicCache(config=model.config)
        output = model.generate(PROMPT, past_key_values=cache, **GREEDY)
        assert torch.equal(output, wanted)
        worker.stop()
        worker = start_worker(checkpoint, broker.address)
        with pytest.raises(HistoryLost, match="history-memory"):
            model.generate(output, past_key_values=cache, **GREEDY)
        worker.stop()

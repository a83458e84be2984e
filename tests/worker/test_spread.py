"""A body over several devices: each range of layers, its keys and values, and what it is handed are on its own.

Without GPUs there are two stand-ins. Two ranges on the CPU compute, and so show that the tokens stay the same. A
range on torch's meta device computes nothing, but there an operation fails if one of its tensors is on another
device, as on a GPU.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

import lora
import tiny
import tiny_diffusion
from fleet import running_broker, start_worker
from split_common.engine import attention
from split_common.engine.footprint import Footprint, measure_footprint
from split_common.engine.layers import LayerRange
from split_common.engine.lora import ChosenAdapter, add_adapter
from split_common.engine.packed import PackedExecutor
from split_common.engine.per_sequence import CacheStore, PerSequenceExecutor
from split_common.engine.pool import ProbePool
from split_common.engine.sdpa import SdpaAttention
from split_common.engine.sequences import TokenRun
from split_common.errors import ConfigError, ModelError
from split_common.models.adapters import read_adapter
from split_common.models.loading import load_part, read_spec
from split_common.models.split import Split
from split_common.models.tensors import parse_devices
from split_common.models.verification import build_manifest
from split_common.system.process import running_command
from split_common.trust.fleet import load_fleet
from split_device import SplitModelForCausalLM
from split_device.cli.doctor import _hardware
from split_device.generation.generator import Generator, Request
from split_worker.bodies import spread as spreading
from split_worker.bodies.loading import load_body, load_language_body
from split_worker.bodies.spread import divide, spread, weight_bytes
from wiretap import LATE

CPU, META = torch.device("cpu"), torch.device("meta")
ROOM = 2**30


# --- which layers go where ---------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    rooms=st.lists(st.integers(20, 200), min_size=1, max_size=4),
    data=st.data(),
)
def test_ranges_take_about_the_same_share_of_their_rooms(sizes: list[int], rooms: list[int], data: Any) -> None:
    """The best of all ways to divide the layers, or none if there is none."""
    cuts = [cut for cut in range(1, len(sizes)) if data.draw(st.booleans())]

    def parts(chosen: tuple[int, ...]) -> list[int]:
        ends = [0, *chosen, len(sizes)]
        return [sum(sizes[begin:end]) for begin, end in itertools.pairwise(ends)]

    def cost(chosen: tuple[int, ...]) -> float:
        return sum((size / room) ** 2 for size, room in zip(parts(chosen), rooms, strict=True))

    every = list(itertools.combinations(cuts, len(rooms) - 1))
    fitting = [c for c in every if all(size <= room for size, room in zip(parts(c), rooms, strict=True))]
    if not fitting:
        with pytest.raises(ModelError if every else ConfigError):
            divide(sizes, rooms, cuts)
        return
    chosen = tuple(divide(sizes, rooms, cuts))
    assert chosen in fitting
    assert cost(chosen) == pytest.approx(min(map(cost, fitting)))


def test_equal_layers_are_divided_equally() -> None:
    assert divide([7] * 26, [ROOM] * 2, range(1, 26)) == [13]
    ends = [0, *divide([7] * 10, [ROOM] * 4, range(1, 10)), 10]
    assert sorted(end - begin for begin, end in itertools.pairwise(ends)) == [2, 2, 3, 3]
    with pytest.raises(ConfigError, match=r"^2 layers cannot be laid over 3 devices: name at most 2$"):
        divide([1, 1], [9] * 3, [1])
    with pytest.raises(ModelError, match=r"12 bytes of weights do not fit, in 2 ranges .* room for 7, 5:"):
        divide([4, 4, 4], [7, 5], [1, 2])


@pytest.mark.parametrize(
    ("names", "count", "wrong"),
    [
        ("gpu", 2, "invalid device 'gpu': expected auto, cpu, cuda"),
        ("cuda:x", 2, "invalid device 'cuda:x'"),
        ("cuda:00", 2, "invalid device 'cuda:00'"),
        ("cuda:127", 2, "does not see cuda:127, but"),
        ("cuda:128", 2, "invalid device 'cuda:128'"),
        ("cuda:255", 2, "invalid device 'cuda:255'"),
        ("cuda:0,cuda:256", 2, "invalid device 'cuda:256'"),
        ("cuda:0,", 2, "invalid device ''"),
        ("cuda,cuda:1", 2, "invalid device 'cuda'"),
        ("cpu,cuda:0", 2, "on GPUs or on the CPU, not on both"),
        ("cuda:1,cuda:1", 2, "names cuda:1 twice"),
        ("cuda:0,cuda:2", 2, "does not see cuda:2, but cuda:0, cuda:1$"),
        ("cuda:0", 0, "does not see cuda:0, but no CUDA device$"),
        ("cuda", 0, "torch sees no CUDA device"),
    ],
)
def test_devices_that_are_not_there_are_refused(
    names: str, count: int, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=wrong):
        parse_devices(names)


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert parse_devices("cuda:2, cuda:0") == [torch.device("cuda:2"), torch.device("cuda:0")]
    assert parse_devices("cuda:1") == [torch.device("cuda:1")]
    assert parse_devices("auto") == parse_devices("cuda") == [torch.device("cuda")]
    assert parse_devices("cpu,cpu") == [CPU, CPU]


@pytest.mark.parametrize(("count", "said"), [(1, "^GPU 0$"), (2, r"^cuda:0 GPU 0, cuda:1 GPU 1 \(a worker's")])
def test_the_doctor_names_the_gpus(count: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert re.search(said, next(iter(_hardware())).detail)


def test_image_models_run_on_one_device(tmp_path: Path) -> None:
    checkpoint = tiny_diffusion.save_sdxl(tmp_path)
    with pytest.raises(ConfigError, match="--device cpu,cpu: the blocks of an image model run on one device"):
        load_body(str(checkpoint), load_fleet(), device=[CPU, CPU])


# --- everything that a range touches is on its device -------------------------------------------------------


def laid_out(directory: Path, adapter: Path | None = None) -> tuple[LayerRange, Any]:
    """The layers 1:5 of a tiny model, the last two on the meta device."""
    spec = read_spec(str(directory))
    split = Split.parse(spec.layers, "1:5")
    model, stack = load_part(spec, split, "worker")
    if adapter is not None:
        add_adapter(
            model,
            stack,
            split,
            "worker",
            read_adapter("a", adapter, build_manifest(spec.checkpoint)),
            0,
            ChosenAdapter(),
        )
    ranges = spread(model, stack, split, spec.text_config, [CPU, META], [ROOM, ROOM])
    assert [(each.device, each.last - each.first) for each in ranges] == [(CPU, 2), (META, 2)]
    assert sum(each.parameter_bytes for each in ranges) == weight_bytes(model)
    return LayerRange(stack, split, int(spec.text_config.hidden_size)), spec.text_config


def mixed_steps(executor: Any, width: int, adapters: bool = False) -> None:
    """Prompts, decoding of many, forks and rollbacks: all outputs come from the last device."""
    rows = [executor.store.new_sequence() for _ in range(5)]
    for counts in ((9, 3, 5, 2, 1), (1, 1, 1, 1, 1), (1, 4, 1, 2, 1)):
        runs = []
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            positions = range(row.length, row.length + count)
            number = 0 if adapters and index % 2 else None
            runs.append(TokenRun(row, torch.randn(count, width), positions, number))
        assert all(output.is_meta for output in executor.launch(runs).wait())
        rows[1].truncate(rows[1].length - 1)
        rows[2].free()
        rows[2] = rows[0].fork()


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt2", "gemma2", "deepseek_dense"])
def test_packed_layers_meet_their_own_device_alone(arch: str, tmp_path: Path) -> None:
    config = {} if arch != "deepseek_dense" else {"first_k_dense_replace": tiny.LAYERS}
    checkpoint = tiny.save(arch.replace("deepseek_dense", "deepseek_v3"), tmp_path, **config)
    layers, _ = laid_out(checkpoint)
    assert layers.devices == [CPU, CPU, META, META]
    assert layers.device == CPU
    layers.owner.set_attn_implementation(attention.ATTENTION_NAME)
    pool = ProbePool(64, 16)
    executor = PackedExecutor(layers, pool, SdpaAttention())
    mixed_steps(executor, layers.width)
    assert [pool.layers[index][0].device for index in layers.split.body] == layers.devices
    assert not executor.capturable


@pytest.mark.parametrize("arch", ["llama", "falcon", "gemma3_text", "mamba2"])
def test_layers_of_one_sequence_meet_their_own_device_alone(arch: str, tmp_path: Path) -> None:
    layers, config = laid_out(tiny.save(arch, tmp_path))
    executor = PerSequenceExecutor(layers, CacheStore(config, layers.split))
    mixed_steps(executor, layers.width)
    row = executor.store.new_sequence()
    executor.launch([TokenRun(row, torch.randn(4, layers.width), range(4))])
    kept = row.cache.layers[layers.split.first : layers.split.last]
    footprint = measure_footprint(kept, layers.devices, 4)
    assert (footprint.token_bytes, footprint.state_bytes) == (row.key_bytes // 4, row.state_bytes)
    assert footprint.share(CPU) == footprint.share(META) == 0.5


def test_adapters_are_on_the_device_of_their_layer(tmp_path: Path) -> None:
    checkpoint = tiny.save("llama", tmp_path / "llama")
    layers, _ = laid_out(checkpoint, lora.save_lora(tmp_path / "a", checkpoint, 1))
    layers.owner.set_attn_implementation(attention.ATTENTION_NAME)
    mixed_steps(PackedExecutor(layers, ProbePool(64, 16), SdpaAttention()), layers.width, adapters=True)


def test_what_is_not_moved_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would fail: hidden states alone are not enough."""

    def hidden_alone(self: Any, _layer: Any, args: Any, kwargs: Any) -> Any:
        return (args[0].to(self._device), *args[1:]), kwargs

    monkeypatch.setattr(spreading._Arguments, "move", hidden_alone)
    layers, _ = laid_out(tiny.save("llama", tmp_path))
    layers.owner.set_attn_implementation(attention.ATTENTION_NAME)
    with pytest.raises(RuntimeError, match="device"):
        mixed_steps(PackedExecutor(layers, ProbePool(64, 16), SdpaAttention()), layers.width)


def test_copies_of_arguments_are_dropped_after_a_forward(tmp_path: Path) -> None:
    layers, _ = laid_out(tiny.save("llama", tmp_path))
    hooks = layers.modules[2]._forward_pre_hooks.values()
    kept = [hook.__self__._copies for hook in hooks if hasattr(hook, "__self__")]
    layers.owner.set_attn_implementation(attention.ATTENTION_NAME)
    executor = PackedExecutor(layers, ProbePool(64, 16), SdpaAttention())
    mixed_steps(executor, layers.width)
    assert kept == [{}]


def test_layers_that_are_tied_stay_on_one_device(tmp_path: Path) -> None:
    """A weight that two layers share cannot be on two devices."""
    spec = read_spec(str(tiny.save("llama", tmp_path)))
    split = Split.parse(spec.layers, "1:5")
    model, stack = load_part(spec, split, "worker")
    for index in (1, 2, 3):
        stack.slots[index].mlp = stack.slots[1].mlp
    with pytest.raises(ConfigError, match="4 layers, some of which have to be on the device of others, cannot"):
        spread(model, stack, split, spec.text_config, [CPU] * 3, [ROOM] * 3)
    ranges = spread(model, stack, split, spec.text_config, [CPU] * 2, [ROOM] * 2)
    assert [(each.first, each.last) for each in ranges] == [(1, 4), (4, 5)]


def test_no_device_gets_more_than_its_room() -> None:
    one, other = torch.device("cuda:0"), torch.device("cuda:1")
    even = Footprint({one: 100, other: 300}, {})
    assert even.total({one: 1000, other: 1500}) == 2000
    # A sequence of few tokens takes states above all, and those are on the first device.
    hybrid = Footprint({one: 100, other: 300}, {one: 50, other: 0})
    assert hybrid.total({one: 1000, other: 3000}) == 1000
    assert Footprint({one: 0}, {one: 0}).total({one: 1000}) == 1000


# --- the whole path ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def adapter(llama: Path) -> Path:
    return lora.save_lora(llama.parent / "a", llama, 1)


@pytest.fixture(scope="module")
def broker(llama: Path, adapter: Path) -> Iterator[str]:
    with running_broker() as running:
        worker = start_worker(llama, running.address, "1:5", adapters=[f"a={adapter}"], devices=[CPU, CPU])
        assert [str(each) for each in worker._body.ranges] == [
            f"{first}:{last} on cpu ({worker._body.parameter_bytes // 2:,} bytes)"
            for first, last in ((1, 3), (3, 5))
        ]
        assert worker._body.runner.unpacked_because is None
        yield running.address
        worker.stop()


PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


def say(model: Any, **options: Any) -> list[list[int]]:
    answer = model.generate(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), **GREEDY, **options)
    return [row.tolist() for row in answer]


def test_answers_are_those_of_the_unsplit_model(broker: str, llama: Path, adapter: Path) -> None:
    """Alone, with beams, which fork and reorder rows, with drafts, which are rolled back, and with an adapter."""
    unsplit = AutoModelForCausalLM.from_pretrained(llama).eval()
    ends = {"broker": broker, "head_layers": 1, "tail_layers": 1}
    with SplitModelForCausalLM.from_pretrained(llama, **ends) as model:
        for options in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
            assert say(model, **options) == say(unsplit, **options)
    with SplitModelForCausalLM.from_pretrained(llama, **ends, adapter=f"a={adapter}") as model:
        assert say(model) == say(lora.unsplit(llama, adapter)) != say(unsplit)


def test_many_at_once_with_a_prefix_cache(broker: str, llama: Path) -> None:
    unsplit = AutoModelForCausalLM.from_pretrained(llama).eval()
    shared = [*range(3, 43)]
    with (
        SplitModelForCausalLM.from_pretrained(llama, broker=broker, head_layers=1, tail_layers=1) as model,
        Generator(model) as generator,
    ):
        settings = GenerationConfig(do_sample=False, max_new_tokens=8)
        generator.submit(Request([*shared, 50], settings)).result(LATE)
        asked = [generator.submit(Request([*shared, 60 + index], settings)) for index in range(5)]
        for index, each in enumerate(asked):
            prompt = torch.tensor([[*shared, 60 + index]])
            wanted = unsplit.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
            each.result(LATE)
            assert [*each.tokens] == wanted[0, prompt.shape[1] :].tolist()
            assert each.cached_tokens


def test_the_command_says_the_layout(llama: Path) -> None:
    with running_command(["broker", "--bind", "tcp://127.0.0.1:*"]) as (_, broker):
        here = ["--model", str(llama), "--broker", broker["address"], "--kv-memory", "64MiB"]
        with running_command(["worker", *here, "--device", "cpu,cpu", "--layers", "1:5"]) as (_, facts):
            assert [(each["device"], each["layers"]) for each in facts["ranges"]] == [
                ("cpu", "1:3"),
                ("cpu", "3:5"),
            ]
            assert sum(each["bytes"] for each in facts["ranges"]) == facts["parameter_bytes"]


def test_a_model_that_is_hybrid_runs_in_ranges(tmp_path: Path) -> None:
    """States, too, are on the devices of their layers; alone and in ranges the outputs are the same."""
    spec = read_spec(str(tiny.save("qwen3_next", tmp_path)))
    split = Split.parse(spec.layers, "1:5")
    states = torch.randn(9, 32)
    outputs = []
    for devices in ([CPU], [CPU, CPU]):
        body = load_language_body(spec, split, devices, kv_bytes=2**24)
        row = body.store.new_sequence()
        outputs.append(body.runner.run([TokenRun(row, states, range(9))])[0])
    assert torch.equal(*outputs)

"""LoRA adapters of a split model: the tokens of PEFT's unsplit model, whoever shares a forward."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import GenerationConfig

import lora
import tiny
from fleet import running_broker, start_worker
from split_common.engine import native
from split_common.engine.sequences import TokenRun
from split_common.errors import ConfigError, ModelError, UnknownAdapter, UnknownModel, UnsupportedFeature
from split_common.models.adapters import LoraConfig
from split_common.protocol import payloads
from split_device import SplitModelForCausalLM
from split_device.generation.generator import Generator, Request
from split_device.models import fused_ends
from split_worker.limits import WorkerLimits
from split_worker.worker import Worker
from wiretap import LATE, record_waits, wait_until

pytestmark = pytest.mark.usefixtures("patient_queue")

#: Settings that PEFT writes, in models with their own kinds of linear layers and ways to run.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.3\.mlp\.down_proj": 6},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "expression": ("qwen2", {"target_modules": r".*\.[03]\..*\.(q|v)_proj", "use_rslora": True}),
    "some-layers": ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [2, 3]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "one-at-a-time": ("bloom", {}),
}
PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
OTHER = torch.tensor([[40, 41, 42]])


def say(model: Any, prompt: torch.Tensor = PROMPT, tokens: int = 12, **options: Any) -> list[list[int]]:
    mask = torch.ones_like(prompt)
    output = model.generate(
        input_ids=prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **options
    )
    return output.tolist()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def a(llama: Path) -> Path:
    return lora.save_lora(llama.parent / "a", llama, 1)


@pytest.fixture(scope="module")
def b(llama: Path) -> Path:
    return lora.save_lora(llama.parent / "b", llama, 2, r=2, target_modules=["q_proj", "o_proj", "lm_head"])


@pytest.fixture(scope="module")
def broker() -> Iterator[Any]:
    with running_broker() as running:
        yield running


@pytest.fixture(scope="module")
def worker(broker: Any, llama: Path, a: Path, b: Path) -> Iterator[Worker]:
    running = start_worker(llama, broker.address, adapters=[str(a), f"second={b}"])
    yield running
    running.stop()


@pytest.fixture
def model(broker: Any, worker: Worker, llama: Path, a: Path, b: Path) -> Iterator[Any]:
    with SplitModelForCausalLM.from_pretrained(llama, broker=broker.address, adapter={"a": a, "b": b}) as split:
        yield split


#: Kinds that are left to the longer tests.
LATER = ("expression", "some-layers", "one-at-a-time", "patterns", "conv1d")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.long) if kind in LATER else kind for kind in KINDS]
)
def test_the_tokens_are_those_of_the_unsplit_model(kind: str, tmp_path: Path) -> None:
    arch, settings = KINDS[kind]
    checkpoint = tiny.save(arch, tmp_path / "model")
    adapter = lora.save_lora(tmp_path / "lora", checkpoint, **settings)
    expected = lora.unsplit(checkpoint, adapter)
    assert say(expected) != say(lora.unsplit(checkpoint))
    with running_broker() as broker:
        worker = start_worker(checkpoint, broker.address, adapters=[str(adapter)])
        try:
            with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address, adapter=adapter) as split:
                assert say(split) == say(expected)
                assert say(split, num_beams=3) == say(expected, num_beams=3)
                torch.testing.assert_close(split(PROMPT).logits, expected(input_ids=PROMPT).logits)
        finally:
            worker.stop()


def test_sessions_with_different_adapters_share_forwards(
    model: Any, worker: Worker, broker: Any, llama: Path, a: Path, b: Path
) -> None:
    expected = {None: lora.unsplit(llama), "a": lora.unsplit(llama, a), "b": lora.unsplit(llama, b)}
    outputs: dict[str | None, Any] = {}

    def run(name: str | None, split: Any) -> None:
        with split:
            outputs[name] = say(split, tokens=24)

    threads = []
    for name, adapter in ((None, None), ("a", a), ("b", b)):
        split = SplitModelForCausalLM.from_pretrained(llama, broker=broker.address, adapter=adapter)
        threads.append(threading.Thread(target=run, args=(name, split)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {name: say(unsplit, tokens=24) for name, unsplit in expected.items()}


def test_rows_with_and_without_adapters_in_one_forward(worker: Worker, llama: Path, a: Path, b: Path) -> None:
    body, split = worker._body, range(2, 4)
    prompts = [
        torch.tensor([list(range(begin, begin + count))]) for begin, count in ((3, 9), (20, 1), (40, 4), (8, 2))
    ]
    adapters = [None, 0, 1, 0]
    unsplit = {None: lora.unsplit(llama), 0: lora.unsplit(llama, a), 1: lora.unsplit(llama, b)}
    runs, expected = [], []
    for prompt, adapter in zip(prompts, adapters, strict=True):
        states = unsplit[adapter](input_ids=prompt, output_hidden_states=True).hidden_states
        positions = range(prompt.shape[1])
        runs.append(TokenRun(body.runner.store.new_sequence(), states[split.start][0].detach(), positions, adapter))
        expected.append(states[split.stop][0])
    for got, wanted in zip(body.launch(runs).wait(), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    # The row without an adapter has the very numbers that it has alone.
    alone = TokenRun(body.runner.store.new_sequence(), runs[0].states, runs[0].positions)
    others = [TokenRun(body.runner.store.new_sequence(), run.states, run.positions) for run in runs[1:]]
    plain = body.launch([alone, *others]).wait()[0]
    again = [TokenRun(body.runner.store.new_sequence(), run.states, run.positions, run.adapter) for run in runs]
    assert torch.equal(body.launch(again).wait()[0], plain)


def test_one_model_chooses_among_its_adapters(model: Any, llama: Path, a: Path, b: Path) -> None:
    plain = say(lora.unsplit(llama))
    assert model.active_adapters() == []
    assert say(model) == plain
    model.set_adapter("b")
    assert say(model) == say(lora.unsplit(llama, b))
    model.set_adapter("a")
    assert model.active_adapters() == ["a"]
    assert say(model) == say(lora.unsplit(llama, a))
    model.disable_adapters()
    assert say(model) == plain
    with pytest.raises(UnknownAdapter, match="no adapter 'c'"):
        model.set_adapter("c")


def test_adapters_take_effect_where_head_and_tail_could_be_fused(
    broker: Any, worker: Worker, llama: Path, b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native.begin() or not native.wait():
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(fused_ends, "LEAST_BYTES", 0)
    plain, expected = say(lora.unsplit(llama)), say(lora.unsplit(llama, b))
    for given in ({"b": b}, None):
        with SplitModelForCausalLM.from_pretrained(llama, broker=broker.address, adapter=given) as split:
            assert say(split) == plain
            if given is None:
                assert split.fused_ends.fusion == "fused"
                split.load_adapter(b, "b")
            split.set_adapter("b")
            assert say(split) == expected


def test_copies_have_the_adapter_and_caches_keep_it(
    model: Any, llama: Path, a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.set_adapter("a")
    expected = lora.unsplit(llama, a)
    waits = record_waits(monkeypatch)
    first = model.generate(PROMPT, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    # The adapter is chosen in the prompt's own trip; then there is one trip for each token.
    assert waits == [[0, 1], [1], [2], [3], [4]]
    cache = first.past_key_values
    twin = copy.deepcopy(cache)
    longer = torch.cat([first.sequences, OTHER], 1)
    assert say(model, longer, past_key_values=twin) == say(expected, longer)
    model.set_adapter("b")
    with pytest.raises(UnsupportedFeature, match="another adapter"):
        say(model, longer, past_key_values=cache)
    model.set_adapter("a")
    assert say(model, longer, past_key_values=cache) == say(expected, longer)


def test_another_worker_replays_with_the_adapter(broker: Any, llama: Path, a: Path, worker: Worker) -> None:
    expected = lora.unsplit(llama, a)
    other = start_worker(llama, broker.address, "1:-1", adapters=[str(a)])
    with SplitModelForCausalLM.from_pretrained(
        llama, broker=broker.address, adapter=a, head_layers=1, tail_layers=1
    ) as split:
        first = split.generate(PROMPT, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        successor = start_worker(llama, broker.address, "1:-1", adapters=[str(a)])
        other.stop()
        try:
            longer = torch.cat([first.sequences, OTHER], 1)
            assert say(split, longer, past_key_values=first.past_key_values) == say(expected, longer)
            assert split.traffic["replays"] == 1
        finally:
            successor.stop()


def test_a_worker_without_the_adapter_is_refused_by_name(
    broker: Any, llama: Path, a: Path, worker: Worker, tmp_path: Path
) -> None:
    unknown = lora.save_lora(tmp_path / "other", llama, 3)
    before = worker.facts()["forwards"]
    with (
        SplitModelForCausalLM.from_pretrained(llama, broker=broker.address, adapter=unknown) as split,
        pytest.raises(UnknownAdapter, match=r"no adapter 'other' is loaded \(loaded: a, second\)"),
    ):
        say(split)
    assert worker.facts()["forwards"] == before
    # A device that is connected to a worker without the adapter finds another one that has it.
    with SplitModelForCausalLM.from_pretrained(llama, broker=broker.address, adapter=unknown) as split:
        split.disable_adapters()
        assert say(split) == say(lora.unsplit(llama))
        second = start_worker(llama, broker.address, adapters=[str(unknown)])
        try:
            split.set_adapter("other")
            for _ in range(2):
                assert say(split) == say(lora.unsplit(llama, unknown))
        finally:
            second.stop()
    with SplitModelForCausalLM.from_pretrained(llama, broker=broker.address, adapter={"a": unknown}) as split:
        split.set_adapter("a")
        with pytest.raises(UnknownAdapter, match="'a' here has other tensors"):
            say(split)


def test_requests_with_different_adapters_share_the_layers_of_the_device(
    model: Any, llama: Path, a: Path, b: Path
) -> None:
    unsplit = {None: lora.unsplit(llama), "": lora.unsplit(llama), "a": lora.unsplit(llama, a)}
    unsplit["b"] = lora.unsplit(llama, b)
    config = GenerationConfig(do_sample=False, max_new_tokens=12)
    with Generator(model) as generator:
        asked = [(name, prompt) for prompt in (PROMPT, OTHER) for name in unsplit]
        running = [generator.submit(Request(prompt[0].tolist(), config, adapter=name)) for name, prompt in asked]
        for (name, prompt), generation in zip(asked, running, strict=True):
            expected = say(unsplit[name], prompt, 12)[0][prompt.shape[1] :]
            assert generation.result() == expected, name
        with pytest.raises(UnknownAdapter):
            generator.submit(Request([5], config, adapter="c"))
        model.load_adapter(b, "late")
        with pytest.raises(UnsupportedFeature, match="after the generator was made"):
            generator.submit(Request([5], config))


def test_others_pass_a_request_that_waits_for_its_adapters_full_worker(llama: Path, a: Path) -> None:
    limits = WorkerLimits(max_sessions=1, evict_after=LATE)
    asked = Request(PROMPT[0].tolist(), GenerationConfig(do_sample=False, max_new_tokens=4), adapter="a")
    with running_broker() as broker, contextlib.ExitStack() as stack:
        stack.callback(start_worker(llama, broker.address, adapters=[str(a)], limits=limits).stop)
        holder = stack.enter_context(SplitModelForCausalLM.from_pretrained(llama, broker=broker.address))
        held = [holder(PROMPT).past_key_values]
        stack.callback(start_worker(llama, broker.address).stop)
        model = stack.enter_context(
            SplitModelForCausalLM.from_pretrained(llama, broker=broker.address, adapter={"a": a}, patience=LATE)
        )
        with Generator(model) as generator:
            waiting = generator.submit(asked)
            active = generator._requests.by_generation
            wait_until(lambda: waiting in active and active[waiting].session.waits_for_room)
            other = generator.submit(dataclasses.replace(asked, adapter=""))
            assert other.result(LATE) == say(lora.unsplit(llama), PROMPT, 4)[0][PROMPT.shape[1] :]
            assert not waiting.done
            held.clear()
            assert waiting.result(LATE) == say(lora.unsplit(llama, a), PROMPT, 4)[0][PROMPT.shape[1] :]


def test_each_adapter_begins_with_what_was_computed_with_it(model: Any, llama: Path, a: Path, b: Path) -> None:
    prompt = torch.arange(5, 45)[None]
    expected = {
        name: say(lora.unsplit(llama, adapter), prompt, eos_token_id=None)[0][prompt.shape[1] :]
        for name, adapter in (("a", a), ("b", b), ("", None))
    }
    assert len({*map(tuple, expected.values())}) == 3
    config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    with Generator(model) as generator:
        for cached in (0, prompt.shape[1] - 1):
            for name, tokens in expected.items():
                generation = generator.submit(Request(prompt[0].tolist(), config, adapter=name))
                assert generation.result(60.0) == tokens
                assert generation.cached_tokens == cached


def test_an_adapter_is_loaded_into_a_running_model(
    broker: Any, worker: Worker, llama: Path, a: Path, b: Path
) -> None:
    with SplitModelForCausalLM.from_pretrained(llama, broker=broker.address) as split:
        split.load_adapter(a)
        assert say(split) == say(lora.unsplit(llama, a))
        split.load_adapter(b, "anything")
        assert split.active_adapters() == ["anything"]
        assert say(split) == say(lora.unsplit(llama, b))
        with pytest.raises(ConfigError, match="has an adapter a already"):
            split.load_adapter(a)
        for refused in (
            split.add_adapter,
            split.delete_adapter,
            split.enable_adapters,
            split.get_adapter_state_dict,
        ):
            with pytest.raises(UnsupportedFeature):
                refused()
        with pytest.raises(UnsupportedFeature, match="revision"):
            split.load_adapter(a, "b", revision="main")
        with pytest.raises(UnsupportedFeature, match="choose one"):
            split.set_adapter(["a", "anything"])


def test_a_side_reads_only_the_tensors_of_its_own_layers(
    broker: Any, worker: Worker, llama: Path, a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    from split_common.engine import lora as engine

    original = engine.read_tensors

    def record(checkpoint: Any, names: Any) -> Any:
        read.extend(names)
        return original(checkpoint, names)

    monkeypatch.setattr(engine, "read_tensors", record)
    with SplitModelForCausalLM.from_pretrained(llama, broker=broker.address, adapter=a):
        layers = {int(name.split(".layers.")[1].split(".")[0]) for name in read}
    assert layers == {0, 1, 4, 5}


#: Changes of an adapter's settings, and what the refusal says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "ia3": ({"peft_type": "IA3"}, "a IA3 of PEFT"),
    "prompts": ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
    "bias": ({"bias": "all"}, "bias"),
    "biases of its own": ({"lora_bias": True}, "lora_bias"),
    "parameters": ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
    "changed weights": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "later settings": ({"use_what_comes_next": 1}, "use_what_comes_next"),
}


def changed(adapter: Path, directory: Path, settings: dict[str, Any]) -> Path:
    """A copy of an adapter with other settings."""
    directory.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text()) | settings
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    return directory


@pytest.mark.parametrize("kind", [*REFUSED])
def test_other_adapters_are_refused_by_name(kind: str, llama: Path, a: Path, tmp_path: Path) -> None:
    settings, message = REFUSED[kind]
    adapter = changed(a, tmp_path / "changed", settings)
    with pytest.raises(UnsupportedFeature, match=message):
        start_worker(llama, "ipc:///nowhere", adapters=[str(adapter)])


def test_adapters_that_do_not_fit_are_refused_by_name(llama: Path, a: Path, tmp_path: Path) -> None:
    def start(*adapters: str) -> None:
        start_worker(llama, "ipc:///nowhere", adapters=adapters)

    with pytest.raises(ModelError, match="whose rank is 8"):
        start(str(changed(a, tmp_path / "rank", {"r": 8})))
    with pytest.raises(ModelError, match=r"which PEFT would not use: target_modules"):
        start(str(changed(a, tmp_path / "fewer", {"target_modules": ["up_proj"]})))
    with pytest.raises(ModelError, match="malformed"):
        start(str(changed(a, tmp_path / "expression", {"target_modules": "("})))
    with pytest.raises(ModelError, match="malformed"):
        start(str(changed(a, tmp_path / "large", {"r": 10**6})))
    with pytest.raises(UnknownModel, match="no adapter in"):
        start(str(llama))
    with pytest.raises(ConfigError, match="two adapters are called a"):
        start(str(a), f"a={a}")
    with pytest.raises(ConfigError, match="invalid name"):
        start(f"{'x' * 129}={a}")
    wide = tiny.save("llama", tmp_path / "wide", hidden_size=48)
    with pytest.raises(ModelError, match="for another model"):
        start(str(lora.save_lora(tmp_path / "b", wide)))
    deep = tiny.save("llama", tmp_path / "deep", num_hidden_layers=9)
    with (
        running_broker() as broker,
        pytest.raises(ModelError, match="which this one lacks"),
    ):
        SplitModelForCausalLM.from_pretrained(
            llama, broker=broker.address, adapter=lora.save_lora(tmp_path / "c", deep)
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "layers.3.mlp.up_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": r"model\.layers\.\d+\.mlp\..*", "exclude_modules": r".*\.2\.mlp.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 3]},
        {"target_modules": ["q_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": ["blocks", "h"]},
    ],
    ids=str,
)
def test_settings_choose_the_modules_that_peft_chooses(settings: dict[str, Any]) -> None:
    theirs, ours = peft.LoraConfig(**settings), LoraConfig("LORA", **settings)
    parts = ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.1.down_proj")
    modules = [f"model.layers.{layer}.{part}" for layer in range(4) for part in parts]
    wanted = [check_target_module_exists(theirs, module) for module in modules]
    # An excluded module is an object of its own kind.
    assert [ours.chooses(module) for module in modules] == [
        isinstance(each, bool | re.Match) and bool(each) for each in wanted
    ]


def test_a_session_chooses_its_adapter_first(model: Any, worker: Worker) -> None:
    """A device that changes the adapter of a session with tokens is refused."""
    model.set_adapter("a")
    request = model.split_parts.adapters.active_request
    body = worker._body
    state = body.new_state()
    body.begin(state, request, memoryview(b""))
    assert state.fork().adapter == state.adapter == 0
    with pytest.raises(Exception, match="only the first request"):
        body.begin(state, request, memoryview(b""))
    other = payloads.UseAdapter("x\n", bytes(32))
    with pytest.raises(UnknownAdapter, match=r"'x\\n'"):
        body.begin(body.new_state(), other, memoryview(b""))

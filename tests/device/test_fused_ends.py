"""Head and tail of `generate` in one call of our own code each: the same tokens, and what goes another way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, DynamicCache

import tiny
from fleet import joined, running_broker
from split_common.engine import native
from split_common.engine.fused_call import FusedCall
from split_common.engine.sequences import TokenRun
from split_common.errors import ConfigError
from split_common.models.loading import read_spec
from split_common.models.split import Split
from split_device.generation.local_layers import LocalLayers
from split_device.models import fused_ends
from split_worker.bodies.loading import load_language_body

PROMPT = torch.tensor([[5, 17, 33, 4, 61, 12, 80], [25, 17, 90, 33, 4, 71, 12]])

GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}

#: Of the usual shape: with biases, norms of queries and keys, joined weights.
USUAL: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "qwen3": {}, "phi3": {"sliding_window": None}}


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    """The code, compiled once."""
    if not native.begin() or not native.wait():
        pytest.skip("needs a C++ compiler")


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with running_broker() as running:
        yield running.address


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are fused, too."""
    monkeypatch.setattr(fused_ends, "LEAST_BYTES", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each call that computes an end."""
    tokens: list[int] = []
    run = FusedCall.run

    def noted(self: FusedCall, states: torch.Tensor, *others: Any) -> None:
        tokens.append(len(states))
        run(self, states, *others)

    monkeypatch.setattr(FusedCall, "run", noted)
    return tokens


@pytest.fixture
def pair(broker: str, tmp_path: Path, small: None) -> Iterator[Callable[..., Any]]:
    """An unsplit model and a split one."""
    with contextlib.ExitStack() as stack:

        def make(arch: str = "llama", head: int = 2, tail: int = 2, **config: Any) -> tuple[Any, Any]:
            checkpoint = tiny.save(arch, tmp_path / arch, **config)
            full = AutoModelForCausalLM.from_pretrained(checkpoint).eval().requires_grad_(False)
            split, _ = stack.enter_context(joined(broker, checkpoint, head, tail))
            return full, split

        yield make


def same(full: Any, split: Any, prompt: torch.Tensor = PROMPT, **options: Any) -> None:
    mask = options.pop("attention_mask", torch.ones_like(prompt))
    answers = [model.generate(prompt, attention_mask=mask, **GREEDY, **options) for model in (full, split)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("arch", USUAL)
def test_tokens_are_the_unsplit_models(arch: str, pair: Callable[..., Any], calls: list[int]) -> None:
    full, split = pair(arch, **USUAL[arch])
    assert split.fused_ends.fusion == "compiling"
    same(full, split)
    assert split.fused_ends.fusion == "fused"
    # Head and tail, of the prompt and of each further token, in two rows.
    assert calls[-24:] == [14, 14, *[2] * 22]
    same(full, split, PROMPT[:1], num_beams=3)
    same(full, split, PROMPT[:1].repeat(1, 9), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(("head", "tail"), [(0, 2), (1, 0)])
def test_an_end_without_layers(head: int, tail: int, pair: Callable[..., Any], calls: list[int]) -> None:
    full, split = pair("llama", head, tail)
    same(full, split)
    assert split.fused_ends.fusion == "fused"
    assert calls[-12:] == [14, *[2] * 11]


@pytest.mark.numbers
def test_logits_and_caches(pair: Callable[..., Any]) -> None:
    full, split = pair()
    caches = [DynamicCache(config=model.config) for model in (full, split)]
    with torch.no_grad():
        for begin, end in ((0, 20), (20, 21), (21, 40)):
            ids = torch.arange(begin, end)[None] % 90
            one, other = (
                model(ids, past_key_values=cache).logits for model, cache in zip((full, split), caches, strict=True)
            )
            assert tiny.deviation(other, one) < 1e-5
        for cache in caches:
            cache.crop(-3)
        one, other = (
            model(ids[:, :2], past_key_values=cache).logits
            for model, cache in zip((full, split), caches, strict=True)
        )
    assert tiny.deviation(other, one) < 1e-5
    assert split.fused_ends.fusion == "fused"
    for index in (0, 1, tiny.LAYERS - 2, tiny.LAYERS - 1):
        theirs, ours = (cache.layers[index] for cache in caches)
        assert tiny.deviation(ours.keys, theirs.keys) < 1e-5
        assert tiny.deviation(ours.values, theirs.values) < 1e-5


def test_what_the_code_does_not_compute_goes_through_the_layers(pair: Callable[..., Any], calls: list[int]) -> None:
    full, split = pair()
    same(full, split)
    calls.clear()
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    same(full, split, attention_mask=padded)
    with torch.no_grad():
        one, other = (model(PROMPT, output_hidden_states=True).hidden_states[1] for model in (full, split))
        assert tiny.deviation(other, one) < 1e-5
        split(PROMPT, use_cache=False)
    assert not calls


def test_hooks_and_changed_weights_take_effect(pair: Callable[..., Any], calls: list[int]) -> None:
    full, split = pair()
    same(full, split)
    calls.clear()
    seen: list[Any] = []
    handle = split.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    same(full, split)
    assert (len(seen), calls) == (12, [14] + [2] * 11)
    handle.remove()
    calls.clear()
    for model in (full, split):
        model.model.layers[0].input_layernorm.weight.mul_(3)
        model.model.layers[-1].mlp.up_proj.weight.mul_(-2)
    same(full, split)
    assert not calls


@torch.no_grad()
def close(full: Any, split: Any, **inputs: Any) -> None:
    one, other = (model(**inputs).logits for model in (full, split))
    assert tiny.deviation(other, one) < 1e-5


def test_states_that_lie_otherwise(pair: Callable[..., Any], calls: list[int]) -> None:
    full, split = pair()
    width = full.config.hidden_size
    states = torch.randn(1, width, 9, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    close(full, split, inputs_embeds=states)
    assert calls[-2:] == [9, 9]


def test_ends_are_compared_on_the_cpu(pair: Callable[..., Any]) -> None:
    _, split = pair()
    with torch.device("meta"):
        split.fused_ends.takes(split.fused_ends._ends[0])
    assert split.fused_ends.fusion == "fused"


def test_the_default_dtype_is_not_that_of_keys(pair: Callable[..., Any], calls: list[int]) -> None:
    full, split = pair()
    same(full, split)
    calls.clear()
    default = torch.get_default_dtype()
    # As transformers sets it for all threads while it loads another model.
    torch.set_default_dtype(torch.bfloat16)
    try:
        cache = DynamicCache(config=split.config)
        split(PROMPT, past_key_values=cache)
    finally:
        torch.set_default_dtype(default)
    assert (calls, cache.layers[0].keys.dtype) == ([14, 14], torch.float32)
    same(full, split)


def test_the_first_forward_may_be_under_autocast(pair: Callable[..., Any], calls: list[int]) -> None:
    full, split = pair()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        split(PROMPT, use_cache=True)
    assert split.fused_ends.fusion == "fused"
    calls.clear()
    same(full, split)
    assert len(calls) == 24


def test_outputs_of_single_layers_leave_the_ends_fused(pair: Callable[..., Any], calls: list[int]) -> None:
    full, split = pair()
    same(full, split)
    with torch.no_grad():
        one, other = (model(PROMPT, output_hidden_states=True).hidden_states[1] for model in (full, split))
    assert tiny.deviation(other, one) < 1e-5
    calls.clear()
    same(full, split)
    assert (len(calls), split.fused_ends.fusion) == (24, "fused")


def test_changes_before_the_first_forward_take_effect(pair: Callable[..., Any], calls: list[int]) -> None:
    full, split = pair()
    seen: list[Any] = []
    handle = split.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    same(full, split)
    assert (len(seen), calls, split.fused_ends.fusion) == (12, [], None)
    handle.remove()
    # Nothing was decided for good.
    same(full, split)
    assert split.fused_ends.fusion == "fused"
    assert calls[-24:] == [14, 14, *[2] * 22]


@pytest.mark.parametrize("first", [False, True])
def test_norms_that_change_in_place(first: bool, pair: Callable[..., Any], calls: list[int]) -> None:
    full, split = pair()
    if not first:
        same(full, split)
    # Neither their versions nor their addresses change.
    for model in (full, split):
        for index in (0, -1):
            model.model.layers[index].input_layernorm.weight.data.mul_(3)
    calls.clear()
    close(full, split, input_ids=PROMPT)
    assert (calls, split.fused_ends.fusion) == ([], None)


@pytest.mark.parametrize("first", [False, True])
def test_hooks_of_all_modules_run(first: bool, pair: Callable[..., Any], calls: list[int]) -> None:
    full, split = pair()
    if not first:
        same(full, split)
    calls.clear()
    mlps = {layer.mlp for layer in (split.model.layers[index] for index in (0, 1, -2, -1))}
    seen: list[Any] = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module) if module in mlps else None)
    try:
        same(full, split)
    finally:
        handle.remove()
    assert (len(seen), calls) == (4 * 12, [])
    same(full, split)
    assert calls[-24:] == [14, 14, *[2] * 22]


def test_a_guess_that_gives_another_output_is_refused(
    pair: Callable[..., Any], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_ends, "FUSED_TOLERANCE", 0.0)
    full, split = pair("qwen3")
    same(full, split)
    assert split.fused_ends.fusion is None
    calls.clear()
    same(full, split)
    assert not calls


@pytest.mark.parametrize("arch", ["gpt2", "mixtral"])
def test_layers_of_other_shapes_run_as_before(arch: str, pair: Callable[..., Any]) -> None:
    full, split = pair(arch)
    assert split.fused_ends is None
    same(full, split)


def test_caches_with_windows_are_not_fused(pair: Callable[..., Any]) -> None:
    full, split = pair("phi3", sliding_window=4)
    same(full, split)
    assert split.fused_ends.fusion is None


def test_a_worker_says_why_layers_are_not_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.save("llama", tmp_path)

    def body(dtype: torch.dtype) -> Any:
        split = Split.from_head_tail(tiny.LAYERS, 2, 2)
        return load_language_body(read_spec(str(checkpoint)), split, torch.device("cpu"), dtype, kv_bytes=1 << 20)

    assert "bfloat16" in body(torch.bfloat16)._unfused_because
    whole = body(torch.float32)
    assert "shape" in whole._unfused_because
    monkeypatch.setattr("split_worker.bodies.language.failed", lambda: True)
    assert "compiler has failed" in whole._unfused_because


def test_tuning_that_is_off(pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_TUNE", "off")
    assert pair()[1].fused_ends is None


@pytest.mark.parametrize("least", [0, 1 << 40])
def test_a_wrong_tuning_is_refused_for_models_of_any_size(
    pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    monkeypatch.setattr("split_device.models.fused_ends.LEAST_BYTES", least)
    monkeypatch.setenv("LAMBDA_SPLIT_TUNE", "maybe")
    with pytest.raises(ConfigError, match="invalid LAMBDA_SPLIT_TUNE 'maybe'"):
        pair()


def test_copies_compute_by_themselves(pair: Callable[..., Any], calls: list[int]) -> None:
    full, split = pair()
    same(full, split)
    layers = LocalLayers(split, 1 << 20)
    calls.clear()
    assert layers.head is not None
    states = torch.randn(3, layers.head.width)
    layers.head.run([TokenRun(layers.head.store.new_sequence(), states, range(3))])
    layers.logits(states, [None] * 3)
    assert not calls
    same(full, split)
    # Weights that have moved are read where they lie now; other ones take effect.
    assert calls == [14, 14, *[2] * 22]
    for model in (full, split):
        norm = model.model.layers[1].post_attention_layernorm.weight
        norm.data = norm.data * 2
    same(full, split)
    assert len(calls) == 24 + 12

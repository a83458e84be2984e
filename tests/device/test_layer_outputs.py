"""Outputs of single layers: the device's are given, those of the body are refused when they are used."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from fleet import joined, running_broker
from split_common.errors import UnsupportedFeature

PROMPT = torch.tensor([[5, 17, 33, 4, 61, 12, 80], [25, 17, 90, 33, 4, 71, 12]])


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with running_broker() as running:
        yield running.address


@pytest.fixture(scope="module", params=[("llama", 2, 2), ("gpt2", 0, 0), ("mixtral", 3, 2)], ids=str)
def pair(request: pytest.FixtureRequest, broker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An unsplit model and a split one, both with attention that can be put out."""
    arch, head, tail = request.param
    checkpoint = tiny.save(arch, tmp_path_factory.mktemp(arch))
    full = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with joined(broker, checkpoint, head, tail) as (split, _):
        for model in (full, split):
            model.set_attn_implementation("eager")
        yield full, split


def outputs(model: Any, **options: Any) -> Any:
    with torch.no_grad():
        return model(PROMPT, **options)


def test_hidden_states(pair: Any) -> None:
    split = pair[1]
    theirs, ours = (outputs(model, output_hidden_states=True).hidden_states for model in pair)
    assert len(ours) == len(theirs) == tiny.LAYERS + 1
    unknown = range(split.split.first + 1, split.split.last)
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.shape == other.shape
        if index not in unknown:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
            continue
        for use in (lambda one=one: 1 + one, lambda one=one: one[0], lambda one=one: torch.stack([one, one])):
            with pytest.raises(UnsupportedFeature, match="on the worker"):
                use()
    assert "hidden_states of layer" in repr(copy.deepcopy(ours)) or not unknown


def test_hidden_states_that_are_selected(pair: Any) -> None:
    theirs, ours = (outputs(model, output_hidden_states=[0, -2]).hidden_states for model in pair)
    assert [one is None for one in ours] == [one is None for one in theirs]


def test_attentions(pair: Any) -> None:
    split = pair[1]
    theirs, ours = (outputs(model, output_attentions=True).attentions for model in pair)
    assert len(ours) == len(theirs) == tiny.LAYERS
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if index not in split.split.body:
            assert tiny.deviation(one, other) < 1e-5
            continue
        with pytest.raises(UnsupportedFeature, match=f"attentions of layer {index} are not here"):
            one.sum()


def test_outputs_of_generate(pair: Any) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [0], "return_dict_in_generate": True}
    full, split = (
        model.generate(PROMPT, output_hidden_states=True, output_attentions=True, **options) for model in pair
    )
    assert split.sequences.tolist() == full.sequences.tolist()
    last = [[step[-1] for step in output.hidden_states] for output in (split, full)]
    torch.testing.assert_close(last[0], last[1], atol=1e-4, rtol=1e-4)


def test_keys_of_the_cache(pair: Any) -> None:
    """Those of the device's layers are there."""
    split = pair[1]
    theirs, ours = (outputs(model, use_cache=True).past_key_values.layers for model in pair)
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if index not in split.split.body:
            assert one.keys.shape == other.keys.shape
            continue
        for name in ("keys", "values"):
            with pytest.raises(UnsupportedFeature, match="keys and values of the body's layers"):
                getattr(one, name)


def test_nothing_is_captured_before_it_is_asked_for(broker: str, tmp_path: Path) -> None:
    """Hooks take time in each step. A LoRA's search for modules still finds the stand-ins afterwards."""
    with joined(broker, tiny.save("llama", tmp_path)) as (split, _):
        assert not any(module._forward_hooks for module in split.split_parts.stack.slots.modules())
        modules = [name for name, _ in split.named_modules()]
        outputs(split, output_hidden_states=True)
        assert split.split_parts.stack.slots[0]._forward_hooks
        assert [name for name, _ in split.named_modules()] == modules


def test_hidden_states_of_beams(pair: Any) -> None:
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "return_dict_in_generate": True}
    full, split = (model.generate(PROMPT, output_hidden_states=True, **options) for model in pair)
    assert split.sequences.tolist() == full.sequences.tolist()
    torch.testing.assert_close(split.hidden_states[-1][0], full.hidden_states[-1][0], atol=1e-4, rtol=1e-4)

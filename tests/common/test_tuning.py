"""What is measured on a CPU, what follows from it, and which products are computed as one."""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from split_common.engine import linear, native, tuning
from split_common.engine.fusion import SharedLinear, become_parts, joined
from split_common.engine.linear import pack_linears
from split_common.engine.lora import AdaptedLinear, ChosenAdapter, LowRank
from split_common.engine.tuning import ROWS, UNMEASURED, Layout, Product, Times, Tuning, choose, tune
from split_common.errors import ConfigError
from split_common.models.layer_stack import LayerStack
from split_common.models.loading import load_part, read_spec
from split_common.models.split import Split


def load_body(directory: Path, arch: str) -> tuple[Any, LayerStack, Split]:
    spec = read_spec(str(tiny.save(arch, directory)))
    split = Split.parse(spec.layers, "1:-2")
    return *load_part(spec, split, "worker"), split


@torch.inference_mode()
def run(stack: LayerStack, tokens: int = 5) -> torch.Tensor:
    embeddings = torch.randn(1, tokens, stack.width, generator=torch.Generator().manual_seed(7))
    output: torch.Tensor = stack.owner(inputs_embeds=embeddings, use_cache=False)[0]
    return output


def measured_as(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has models of any size measured, with one layout as the outcome."""
    monkeypatch.setattr(linear, "LEAST_BYTES", 0)
    monkeypatch.setattr(native, "begin", lambda: False)
    monkeypatch.setattr(
        linear,
        "tune",
        lambda products, *_: Tuning(
            dict.fromkeys(products, layout), {each: {1: 4, 3: 4} for each in products}, True
        ),
    )


#: Products that compute several layers, in each layer of a model.
JOINED = {"llama": 2, "qwen2": 2, "gpt_neox": 0, "phi": 1, "cohere2": 1, "gpt2": 0}


@pytest.mark.numbers
@pytest.mark.parametrize("layout", ["plain", "onednn"])
@pytest.mark.parametrize("arch", JOINED)
def test_layers_of_one_input_are_computed_as_one(
    arch: str, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stack, split = load_body(tmp_path, arch)
    names = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    weights = {name: model.get_submodule(name).weight.clone() for name in names}
    wanted, many = run(stack), run(stack, 70)
    measured_as(layout, monkeypatch)
    assert pack_linears(model, stack).joined == JOINED[arch] * (split.last - split.first)
    for tokens in (5, 1, 3, 5):
        assert run(stack, tokens).shape[1] == tokens
    torch.testing.assert_close(run(stack), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)
    torch.testing.assert_close(run(stack, 70), many, atol=1e-5 * float(many.abs().max()), rtol=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(model.get_submodule(name).weight, weight, atol=0, rtol=0)


@pytest.mark.numbers
def test_a_layer_that_changes_its_input_between_two_products_keeps_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stack, _ = load_body(tmp_path, "llama")
    wrong = type(stack.slots[1].mlp)

    def forward(self: Any, states: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(states)
        output: torch.Tensor = self.down_proj(gate * self.up_proj(states.mul_(2)))
        return output

    monkeypatch.setattr(wrong, "forward", forward)
    wanted = run(stack)
    assert pack_linears(model, stack).joined == 0
    assert not any(isinstance(module, SharedLinear) for module in model.modules())
    torch.testing.assert_close(run(stack), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)


@pytest.mark.numbers
def test_adapters_stay_beside_the_products(tmp_path: Path) -> None:
    model, stack, _ = load_body(tmp_path, "llama")
    attention = stack.slots[1].self_attn
    adapted = AdaptedLinear(attention.q_proj, ChosenAdapter())
    adapted._chosen.number = 0
    width = attention.q_proj.in_features
    adapted.parts["0"] = LowRank(torch.randn(2, width), torch.randn(attention.q_proj.out_features, 2), 0.5)
    attention.q_proj = adapted
    wanted = run(stack)
    assert pack_linears(model, stack).joined
    assert isinstance(adapted.base, SharedLinear)
    torch.testing.assert_close(run(stack), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)


def test_weights_of_a_joined_product_are_not_held_twice() -> None:
    linears = [nn.Linear(4, 3), nn.Linear(4, 5, bias=False), nn.Linear(4, 2)]
    states = torch.randn(2, 4)
    wanted = torch.cat([each(states) for each in linears], -1)
    whole = joined(linears)
    become_parts(linears, whole)
    torch.testing.assert_close(whole(states), wanted)
    torch.testing.assert_close(torch.cat([each(states) for each in linears], -1), wanted)
    storage = whole.weight.untyped_storage().data_ptr()
    assert all(each.weight.untyped_storage().data_ptr() == storage for each in linears)


# --- measuring ------------------------------------------------------------------------------------------------

PRODUCTS = [Product(8, 16, torch.float32), Product(16, 8, torch.float32)]


def times(plain: Mapping[int, float], onednn: Mapping[int, float]) -> Times:
    return {str(product): {"plain": dict(plain), "onednn": dict(onednn)} for product in PRODUCTS}


def test_the_layout_that_is_least_behind_is_chosen_and_few_rows_are_computed_as_more_where_that_is_faster() -> None:
    slow_for_two = dict(zip(ROWS, (1.0, 1.8, 1.8, 2.0, 4.0), strict=True))
    flat = dict(zip(ROWS, (1.3, 1.3, 1.0, 1.2, 4.0), strict=True))
    chosen = choose(times(plain=slow_for_two, onednn=flat), PRODUCTS)
    assert set(chosen.layouts.values()) == {"onednn"}
    assert all(rows == {1: 4, 2: 4, 3: 4} for rows in chosen.rows.values())
    assert len(chosen.rows) == len(PRODUCTS)
    assert [chosen.padded(rows) for rows in (1, 8, 9, 17)] == [1, 8, 10, 20]
    steady = dict(zip(ROWS, (1.0, 1.1, 1.2, 1.4, 4.0), strict=True))
    slower = {rows: 1.2 * seconds for rows, seconds in flat.items()}
    chosen = choose(times(plain=steady, onednn=slower), PRODUCTS)
    assert set(chosen.layouts.values()) == {"plain"}
    assert not chosen.rows
    assert [chosen.padded(rows) for rows in (1, 2, 3, 17, 1001)] == [1, 2, 3, 17, 1001]


def test_unmeasured_numbers_of_rows_are_few() -> None:
    assert [UNMEASURED.padded(rows) for rows in (1, 2, 3, 8, 9, 17)] == [1, 2, 3, 8, 10, 20]
    padded = [UNMEASURED.padded(rows) for rows in range(1, 2049)]
    assert len(set(padded)) < 50
    assert all(rows <= more <= 1.25 * rows for rows, more in enumerate(padded, 1))


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], tuple[Tuning, int]]:
    """Measures `PRODUCTS` with a cache in `tmp_path`. Returns what was chosen and how many layouts were tried."""
    monkeypatch.setenv("LAMBDA_SPLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SECONDS", 0.0)

    def once() -> tuple[Tuning, int]:
        tried = []

        def apply(weight: torch.Tensor, layout: Layout) -> tuning.Apply:
            tried.append(layout)
            if layout == "onednn":
                raise RuntimeError("not on this CPU")
            return lambda states: states @ weight.T

        return tune(PRODUCTS, lambda product: torch.randn(product.outputs, product.inputs), apply), len(tried)

    return once


def test_a_machine_measures_once(measure: Callable[[], tuple[Tuning, int]], tmp_path: Path) -> None:
    first, tried = measure()
    assert first.measured
    assert set(first.layouts.values()) == {"plain"}
    assert tried == 2 * len(PRODUCTS)
    assert measure() == (first, 0)
    (file,) = (tmp_path / "cache" / "tuning").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for spoilt in (b"", b"{}", b'{"8x16 float32": {"plain": {"1": 1.0}}}'):
        file.write_bytes(spoilt)
        assert measure()[1] == 2 * len(PRODUCTS)
        assert measure()[1] == 0


def test_nothing_is_kept_where_nothing_can_be_written(
    measure: Callable[[], tuple[Tuning, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_CACHE", "/proc/none")
    assert measure()[0].measured
    assert measure()[1] == 2 * len(PRODUCTS)


def test_measuring_can_be_turned_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as("plain", monkeypatch)
    model, stack, _ = load_body(tmp_path, "llama")
    assert not pack_linears(model, stack, measure=False).measured
    monkeypatch.setenv("LAMBDA_SPLIT_TUNE", "off")
    assert not tuning.from_environment()


def test_other_words_than_on_and_off_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_TUNE", "no")
    with pytest.raises(ConfigError, match="invalid LAMBDA_SPLIT_TUNE 'no': expected on or off"):
        tuning.from_environment()

"""`benchmarks.models`: small models of many structures, through processes of broker and workers.

`make test` foretells how a few run, `make test-long` runs one, and `make test-nightly` all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_benchmarks import run

from benchmarks.model_outcomes import foretold, inspected
from benchmarks.models import IDENTICAL, REFUSED, UNAVAILABLE, WRONG, summary
from benchmarks.named_models import MODELS

FEATURES = (
    "greedy",
    "padded",
    "beams",
    "lookup",
    "assisted",
    "multi_turn",
    "fork",
    "mixed",
    "replayed",
    "evicted",
    "foretold",
)


def check(results: dict[str, Any]) -> None:
    assert set(results) == {"identical", "refused", "wrong", "features"}
    assert results["wrong"] == [], results["features"]
    for name in results["identical"]:
        assert tuple(results["features"][name]) == FEATURES
    assert sorted([*results["identical"], *results["refused"]]) == sorted(results["features"])


@pytest.mark.long
def test_a_model() -> None:
    results = run("models", "--only", "gpt_oss_mxfp4")
    check(results)
    assert results["identical"] == ["gpt_oss_mxfp4"]


@pytest.mark.nightly
def test_all_models() -> None:
    results = run("models")
    check(results)
    assert len(results["features"]) == 24
    assert len(results["identical"]) >= 19


@pytest.mark.parametrize(
    ("name", "packed", "outcome"),
    [
        ("qwen3_vl", True, IDENTICAL),
        ("lfm2", False, IDENTICAL),
        ("llama4", False, f"{REFUSED}no padding"),
        ("deepseek_v4", None, REFUSED),
    ],
)
def test_commands_say_how_a_model_runs(name: str, packed: bool | None, outcome: str, tmp_path: Path) -> None:
    model = MODELS[name].save(tmp_path)
    shown = inspected(model)
    if packed is None:
        outcome += shown["error"]["message"]
    else:
        unsplit = MODELS[name].unsplit(model)
        assert sum(part["parameters"] for part in shown["parts"]) == unsplit.num_parameters()
    assert foretold(model, packed, outcome) == IDENTICAL
    assert foretold(model, not packed, outcome).startswith(WRONG)


def test_each_model_has_one_outcome() -> None:
    usual = dict.fromkeys(FEATURES, IDENTICAL)
    features = {
        "right": usual | {"assisted": f"{UNAVAILABLE}assistants need a cache"},
        "refused": usual | {"padded": f"{REFUSED}no padding", "fork": f"{REFUSED}no forks"},
        "wrong": usual | {"padded": f"{REFUSED}no padding", "fork": f"{WRONG}answers [0] of 3 differ"},
        "no reference": {"greedy": f"{UNAVAILABLE}AttributeError"},
    }
    assert summary(features) == {
        "identical": ["right"],
        "refused": {"refused": "padded: no padding"},
        "wrong": ["wrong", "no reference"],
    }

"""Layers that choose their keys by an indexer, and layers that use what another one has computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generate import (
    BATCH,
    MASK,
    beams,
    greedy,
    padded_batch,
    prompt_lookup,
    shared_prefix,
    two_turns_configured,
)
from test_replay import fleet_of, strike_at

import tiny
from fleet import joined, running_broker, start_worker
from split_common.errors import InvalidSplit
from split_common.models.layer_links import Link, nearest_cut
from split_common.models.split import Split
from split_device import SplitModelForCausalLM

MODES = (greedy, padded_batch, beams, prompt_lookup, two_turns_configured, shared_prefix)


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with running_broker() as running:
        yield running.address


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("arch", "ends", "said"),
    [
        pytest.param(
            "glm_moe_dsa", (2, 2), "layer 2 attends to the keys that an indexer chooses", marks=pytest.mark.long
        ),
        ("deepseek_v32", (2, 2), "layer 2 attends"),
        ("gemma4_unified_text", (2, 0), ""),
        pytest.param("gemma4_unified_text", (0, 4), "", marks=pytest.mark.long),
    ],
)
def test_same_tokens(arch: str, ends: tuple[int, int], said: str, broker: str, tmp_path: Path) -> None:
    full = tiny.build(arch)
    with joined(broker, tiny.save(arch, tmp_path), *ends) as (model, worker):
        for mode in MODES:
            assert mode(model).tolist() == mode(full).tolist(), mode.__name__
        with torch.no_grad():
            theirs, ours = (each(BATCH, attention_mask=MASK).logits[MASK == 1] for each in (full, model))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
        assert said in worker._body.describe("")[-1]


@pytest.mark.long
@pytest.mark.usefixtures("patient_queue")
def test_a_lost_worker_is_replaced(tmp_path: Path) -> None:
    with fleet_of(tiny.save("glm_moe_dsa", tmp_path)) as (model, workers):
        strike_at(model, workers, {3})
        assert beams(model).tolist() == beams(tiny.build("glm_moe_dsa")).tolist()
        assert workers.ended == 1


def test_memory_has_the_keys_of_indexers(broker: str, tmp_path: Path) -> None:
    """Two layers, of which a token has 16 numbers of keys, 8 rotated ones and 8 of an indexer."""
    checkpoint = tiny.save("deepseek_v32", tmp_path)
    with joined(broker, checkpoint, 2, 2) as (_, worker):
        assert worker._body.store.capacity == 64 * 1024**2 // (2 * (16 + 8 + 8) * 4)


@pytest.mark.parametrize(
    ("arch", "ends", "advice"),
    [
        ("glm_moe_dsa", (3, 2), r"layer 3 uses the choice of keys of layer 2, .* use --layers 2:4 \(head_layers=2"),
        ("glm_moe_dsa", (2, 1), r"layer 5 uses the choice of keys of layer 4, .* use --layers 2:4 .*tail_layers=2"),
        (
            "gemma4_unified_text",
            (2, 2),
            r"layer 4 uses keys and values of layer 2, .* 2:6 .*tail_layers=0",
        ),
        (
            "gemma4_unified_text",
            (1, 3),
            r"layer 4 uses keys and values of layer 2, .* 1:2 .*tail_layers=4",
        ),
    ],
)
def test_a_cut_that_parts_layers(
    arch: str, ends: tuple[int, int], advice: str, broker: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    """Either side refuses it before anything travels, and names a cut that would do."""
    head, tail = ends
    checkpoint = tiny.save(arch, tmp_path)
    with pytest.raises(InvalidSplit, match=advice):
        start_worker(checkpoint, broker, f"{head}:{-tail}")
    with pytest.raises(InvalidSplit, match=advice):
        SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker, head_layers=head, tail_layers=tail)
    shown = run("inspect", checkpoint, "--layers", f"{head}:{-tail}")
    assert (shown.code, bool(re.search(advice, shown.err))) == (2, True)


def test_the_nearest_cut() -> None:
    links = [Link(5, 2, "keys"), Link(8, 7, "keys")]
    assert str(nearest_cut(links, Split(10, 2, 8))) == "2:7"
    assert str(nearest_cut(links, Split(10, 3, 7))) == "6:7"
    assert str(nearest_cut([Link(9, 0, "keys")], Split(10, 2, 8))) == "0:10"
    assert str(nearest_cut([Link(9, 4, "keys")], Split(10, 4, 8))) == "4:10"
    assert str(nearest_cut([Link(index, 0, "keys") for index in range(1, 10)], Split(10, 2, 8))) == "0:10"

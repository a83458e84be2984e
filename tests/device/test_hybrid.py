"""Models whose layers keep states: the tokens of the unsplit model, whatever happens to their sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generate import (
    BATCH,
    GREEDY,
    MASK,
    PROMPT,
    REPETITIVE,
    assistant,
    beams,
    greedy,
    padded_batch,
    prompt_lookup,
    shared_prefix,
    two_turns_configured,
)
from test_generator import alone, requests
from test_replay import fleet_of, strike_at
from transformers import DynamicCache

import tiny
from fleet import joined, running_broker
from split_common.errors import SplitError, UnsupportedFeature
from split_device.generation.generator import Generator

Model = Any

#: The modes that transformers allows for these models.
MODES = (greedy, padded_batch, beams, two_turns_configured, shared_prefix)


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with running_broker() as running:
        yield running.address


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return tiny.saved_once(tmp_path_factory)


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("arch", "ends"),
    [
        ("qwen3_next", 1),
        ("lfm2", 1),
        ("mamba2", 1),
        *(
            pytest.param(arch, 1, marks=pytest.mark.long)
            for arch in ("qwen3_5_text", "granitemoehybrid", "nemotron_h")
        ),
        *(pytest.param(arch, 0, marks=pytest.mark.long) for arch in ("qwen3_next", "mamba2")),
    ],
)
def test_same_tokens(arch: str, ends: int, broker: str, checkpoint: Callable[[str], Path]) -> None:
    full = tiny.build(arch)
    with joined(broker, checkpoint(arch), ends, ends) as (model, worker):
        for mode in MODES if model.split_parts.traits.attends else MODES[:3]:
            assert mode(model).tolist() == mode(full).tolist(), mode.__name__
        assert "sessions run one at a time: layer" in worker._body.describe("")[-1]
        with torch.no_grad():
            theirs, ours = (each(BATCH, attention_mask=MASK).logits[MASK == 1] for each in (full, model))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.numbers
@pytest.mark.parametrize("arch", ["lfm2", pytest.param("granitemoehybrid", marks=pytest.mark.long)])
def test_many_requests_at_once(arch: str, broker: str, checkpoint: Callable[[str], Path]) -> None:
    """Head and tail of a generator keep states, too; beside it, calls of `generate` use the same worker."""
    full = tiny.build(arch)
    asked = requests(6)
    with (
        joined(broker, checkpoint(arch), 1, 1) as (model, _),
        Generator(model) as generator,
        ThreadPoolExecutor(3) as pool,
    ):
        calls = [pool.submit(mode, model) for mode in (greedy, beams, padded_batch)]
        answers = [each.result() for each in [generator.submit(request) for request in asked]]
        beside = [call.result().tolist() for call in calls]
    assert answers == [alone(full, request) for request in asked]
    assert beside == [mode(full).tolist() for mode in (greedy, beams, padded_batch)]


@pytest.mark.long
@pytest.mark.usefixtures("patient_queue")
def test_a_lost_worker_is_replaced(checkpoint: Callable[[str], Path]) -> None:
    full = tiny.build("qwen3_next")
    for mode in (greedy, padded_batch, beams):
        with fleet_of(checkpoint("qwen3_next")) as (model, workers):
            strike_at(model, workers, {2, 4})
            assert mode(model).tolist() == mode(full).tolist()
            assert workers.ended == 2


@pytest.mark.parametrize("back", [2, 10, 40])
def test_a_session_is_taken_back(back: int, broker: str, checkpoint: Callable[[str], Path]) -> None:
    """By what the worker runs again, or by a replay: it does not know what came before its snapshot."""
    prompt = torch.arange(5, 55)[None]
    after = torch.tensor([[60, 61, 62]])
    full = tiny.build("qwen3_next")
    with joined(broker, checkpoint("qwen3_next"), 0, 0) as (model, worker), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(prompt[:, :45], past_key_values=cache)
        for token in prompt[0, 45:]:
            model(token[None, None], past_key_values=cache)
        cache.crop(-back)
        kept = torch.cat([prompt[:, :-back], after], 1)
        ours = model(after, past_key_values=cache).logits
        theirs = full(kept).logits[:, -3:]
        assert worker.counters["refused_evicted"] == (back > 5)
        assert model.traffic["replays"] == (back > 5)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mode", [prompt_lookup, assistant])
def test_assisted_decoding(mode: Callable[[Model], torch.Tensor], checkpoint: Callable[[str], Path]) -> None:
    """transformers refuses it for such models. Here it is refused only if states are the device's."""
    wanted = tiny.build("qwen3_next").generate(REPETITIVE, **GREEDY)
    with running_broker() as broker:
        with joined(broker.address, checkpoint("qwen3_next"), 0, 0) as (model, worker):
            assert mode(model).tolist() == wanted.tolist()
            assert worker.counters["refused_evicted"] == 0
        with (
            joined(broker.address, checkpoint("qwen3_next"), 1, 1) as (model, _),
            pytest.raises(UnsupportedFeature, match="leave all such layers to the worker"),
        ):
            mode(model)


@pytest.mark.usefixtures("patient_queue")
def test_a_step_that_failed_is_tried_again(broker: str, checkpoint: Callable[[str], Path]) -> None:
    """The head has run by then, and its states are taken back."""
    full = tiny.build("qwen3_next")
    with torch.no_grad():
        wanted = full(PROMPT).logits[:, -4:]
        with joined(broker, checkpoint("qwen3_next"), patience=0.5) as (model, worker):
            cache = DynamicCache(config=model.config)
            model(PROMPT[:, :-4], past_key_values=cache)
            worker.stop()
            with pytest.raises(SplitError):
                model(PROMPT[:, -4:], past_key_values=cache)
            with joined(broker, checkpoint("qwen3_next")):
                ours = model(PROMPT[:, -4:], past_key_values=cache).logits
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-3)


def test_a_cache_of_states_alone_is_not_continued_by_generate(
    broker: str, checkpoint: Callable[[str], Path]
) -> None:
    with (
        joined(broker, checkpoint("mamba2"), 1, 1) as (model, _),
        pytest.raises(UnsupportedFeature, match="states alone"),
    ):
        two_turns_configured(model)


def test_padding_between_tokens_is_refused(broker: str, checkpoint: Callable[[str], Path]) -> None:
    """A state decays over it."""
    mask = torch.ones_like(PROMPT)
    mask[0, 4] = 0
    with joined(broker, checkpoint("lfm2"), 1, 1) as (model, _):
        with pytest.raises(UnsupportedFeature, match="keep states"):
            model.generate(PROMPT, attention_mask=mask, **GREEDY)
        cache = DynamicCache(config=model.config)
        tiny.build("lfm2")(PROMPT, past_key_values=cache)
        with pytest.raises(UnsupportedFeature, match="filled by an unsplit model"):
            model(PROMPT, past_key_values=cache)

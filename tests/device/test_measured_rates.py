"""What `ping` measures of a connection, and what it predicts from that of texts that a model wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from transformers import GenerationConfig

import tiny
from fleet import split_model
from split_common.errors import MeasurementTimeout
from split_device.generation.cycles import Cycles
from split_device.generation.generator import Generator, Request
from split_device.generation.measured import Measured
from split_device.generation.ping import CODEC_STEPS, STEPS, TREE_SESSIONS, Ping
from split_device.generation.settings import NO_END
from split_device.speculation.drafters import TREE_TOKENS
from split_device.speculation.forecast import SampleText

pytestmark = [pytest.mark.usefixtures("patient_queue"), pytest.mark.long]

#: Repetitions, so that something can be guessed.
PROMPTS = [[3, 17, 17, 33, 17, 17, 33], [9, 8, 7, 9, 8, 7, 9, 8], [40]]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with split_model(tiny.save("llama", tmp_path_factory.mktemp("model") / "llama")) as model:
        yield model


@pytest.fixture(scope="module")
def measured(split: Any) -> Measured:
    return Ping(split, PROMPTS, [], lambda _: None, seconds=0.0).measure()


def test_all_is_measured_more_than_once(measured: Measured) -> None:
    assert measured.notes == []
    assert {sessions: tuple(row) for sessions, row in measured.cycles.items()} == STEPS
    assert all(list(row) == [1] for row in measured.plain.values())
    assert measured.plain.keys() == STEPS.keys()
    for row in (*measured.plain.values(), *measured.cycles.values(), measured.worker, measured.device):
        for spread in row.values():
            assert spread.samples >= 4
            assert 0 < spread.low <= spread.median <= spread.high
    single = measured.plain[1][1]
    assert 0 < measured.round_trip.low < single.high
    assert measured.worker[1].low + measured.device[1].low < measured.cycles[1][1].high
    trees = ("recycle", "suffix-recycle")
    assert measured.choices(2) == ("auto", "off", "ngram", "suffix", *trees)
    assert measured.choices(8) == ("auto", "off", "ngram", "suffix")
    assert measured.trees is not None
    assert {sessions: list(row) for sessions, row in measured.trees.cycles.items()} == {
        sessions: [TREE_TOKENS] for sessions in TREE_SESSIONS
    }


def test_codecs_are_measured_by_what_they_send(split: Any, measured: Measured) -> None:
    assert split.split_parts.client.codec.name == "exact"
    for name, cost in measured.codecs.items():
        # Steps that may hold drafts have one size, those that cannot are smaller.
        for sizes, plain in (
            (cost.up, measured.plain_codecs[name].up),
            (cost.down, measured.plain_codecs[name].down),
        ):
            assert tuple(sizes) == CODEC_STEPS
            assert 0 < plain[1] < min(sizes.values()), name
    exact, int8 = measured.codecs["exact"], measured.codecs["int8"]
    # 32 float32 of each token.
    assert exact.up[16] > 16 * 128
    # Headers and scales are a large part of so narrow states.
    assert int8.up[16] < 0.7 * exact.up[16]
    assert (exact.message, exact.token) == pytest.approx((0, 0), abs=1e-12)


def test_the_sample_is_what_the_model_says(split: Any, measured: Measured) -> None:
    for prompt, found in zip(PROMPTS, measured.texts, strict=True):
        assert found.prompt == prompt
        with Generator(split, prefix_cache=0, speculate="off") as generator:
            assert generated(generator, found) == found.answer
        for token, likeliest in zip(found.answer, found.expected, strict=True):
            assert likeliest[0][0] == token
            assert len(likeliest) == 16
            assert all(high >= low for (_, high), (_, low) in pairwise(likeliest))


def generated(generator: Generator, found: SampleText, speculate: str | None = None) -> list[int]:
    config = GenerationConfig(do_sample=False, max_new_tokens=len(found.answer), eos_token_id=[NO_END])
    tokens: list[int] = generator.submit(Request(found.prompt, config, speculate=speculate)).result(60)
    return tokens


def answered_anew(split: Any, measured: Measured, speculate: str) -> tuple[int, int]:
    """Has the sample answered again. Returns its tokens and steps after the first ones."""
    with Generator(split, prefix_cache=0, speculate=speculate) as generator:
        for found in measured.texts:
            assert generated(generator, found) == found.answer
        steps = generator.counters["steps"] - len(measured.texts)
    return sum(len(each.answer) - 1 for each in measured.texts), steps


@pytest.mark.parametrize("speculate", ["off", "ngram", "suffix"])
def test_steps_are_as_many_as_predicted(split: Any, measured: Measured, speculate: str) -> None:
    """Drafters that look at the text alone draft in a prediction what they draft on the device."""
    tokens, steps = answered_anew(split, measured, speculate)
    predicted = measured.forecast(speculate, "exact", 1)
    assert predicted.tokens_per_step == pytest.approx(tokens / steps)
    assert (speculate == "off") == (steps == tokens)


def test_every_setting_is_predicted(measured: Measured) -> None:
    for sessions in (1, 2):
        for speculate in measured.choices(sessions):
            for codec in ("exact", "int4"):
                found = measured.forecast(speculate, codec, sessions)
                assert found.tokens_per_second > 0
                assert 1 <= found.tokens_per_step <= TREE_TOKENS


@pytest.mark.parametrize("speculate", ["recycle", "suffix-recycle"])
def test_several_continuations_are_predicted_by_answers(split: Any, measured: Measured, speculate: str) -> None:
    tokens, steps = answered_anew(split, measured, speculate)
    assert measured.trees is not None
    answers = measured.trees.answers[speculate]
    assert (answers.tokens, answers.steps) == (tokens, steps)
    # Of what was measured, the prediction is what came.
    predicted = measured.forecast(speculate, "exact", 1)
    assert predicted.tokens_per_second == pytest.approx(tokens / answers.seconds)
    assert predicted.tokens_per_step == pytest.approx(tokens / steps)


def test_answers_that_were_faster_than_their_cycles_have_a_rate(measured: Measured) -> None:
    assert measured.trees is not None
    answers = {name: replace(each, seconds=0.0) for name, each in measured.trees.answers.items()}
    noisy = replace(measured, trees=replace(measured.trees, answers=answers))
    for sessions in (1, 2):
        assert noisy.forecast("recycle", "exact", sessions).tokens_per_second > 0


def test_what_takes_too_long_ends_and_says_so(split: Any) -> None:
    with Generator(split, prefix_cache=0, speculate="off") as generator:
        cycles = Cycles(split, generator, PROMPTS)
        with pytest.raises(MeasurementTimeout, match="steps of 2 sessions came back in 0 s"):
            cycles.measure(2, [1, 4], 100, (100, 100), 1e6, limit=0.0)
        # Nothing is left of it.
        assert len(cycles.measure(2, [1, 4], 2, (2, 2), 0.0, limit=60.0)) == 2 * 2 * 2

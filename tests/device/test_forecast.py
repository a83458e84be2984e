"""Predictions of tokens per second, from times that are given."""

from __future__ import annotations

import pytest

from split_device.speculation.forecast import CycleTimes, SampleText, forecast

LONGEST = 15
FLAT = CycleTimes({1: {1: 0.1, 16: 0.1}})


def text(answer: list[int], prompt: list[int] | None = None) -> SampleText:
    """A text of which the model was nearly sure."""
    return SampleText(prompt or [1, 2, 3], answer, [[(token, -0.01), (0, -5.0)] for token in answer], 50)


def test_times_between_measured_ones_lie_on_lines() -> None:
    times = CycleTimes({1: {1: 1.0, 4: 4.0, 16: 10.0}, 4: {1: 2.0, 4: 8.0}})
    assert [times.of(1, tokens) for tokens in (1, 2, 4, 10, 16)] == pytest.approx([1, 2, 4, 7, 10])
    # Of two sessions a third of the way from one to four.
    assert times.of(2, 2) == pytest.approx(1 + 1 / 3)
    assert times.of(4, 16) == pytest.approx(8)
    # Beyond the last point on the last line.
    assert times.of(1, 22) == pytest.approx(13)
    assert times.of(7, 7) == pytest.approx(3)


def test_what_a_codec_and_a_drafter_add_counts_for_each_message_and_token() -> None:
    times = CycleTimes({1: {1: 1.0, 16: 1.0}, 4: {1: 1.0, 16: 1.0}}, 0.1, 0.01, 0.001)
    assert times.of(1, 1) == pytest.approx(1 + 0.1 + 0.011)
    assert times.of(4, 20) == pytest.approx(1 + 4 * 0.1 + 20 * 0.011)
    # What a codec saves leaves some time.
    assert CycleTimes({1: {1: 1.0, 16: 1.0}}, -5.0).of(1, 1) == pytest.approx(0.1)


def test_without_drafts_a_step_is_a_token() -> None:
    found = forecast([text([5, 6, 7, 8, 9])], "off", 1, FLAT, LONGEST)
    assert found.tokens_per_step == 1
    assert found.tokens_per_second == pytest.approx(10)
    found = forecast([text([5, 6, 7, 8]), text([5, 6, 7, 8, 9, 4])], "off", 4, FLAT, LONGEST)
    assert found.tokens_per_second == pytest.approx(40)


def test_a_text_that_repeats_itself_needs_few_steps() -> None:
    period = [11, 12, 13, 14, 15]
    repeated = text(period * 8, period * 2)
    found = forecast([repeated], "ngram", 1, FLAT, LONGEST)
    # 39 tokens after the first one, 16 a step at most.
    assert found.tokens_per_step == pytest.approx(39 / 3)
    assert found.tokens_per_second == pytest.approx(10 * 39 / 3)
    # `auto` learns it, and nothing where a token costs as much as a step.
    dear = CycleTimes({1: {1: 0.1, 16: 1.6}})
    assert forecast([repeated], "auto", 1, FLAT, LONGEST).tokens_per_step > 1.5
    assert forecast([repeated], "auto", 1, dear, LONGEST).tokens_per_second == pytest.approx(10, rel=0.1)


def test_steps_with_less_room_take_less_time() -> None:
    plain = CycleTimes({1: {1: 0.1}})
    times = CycleTimes({1: {1: 0.25, 16: 0.4}}, room=16, plain=plain)
    assert times.of(1, 1) == times.of(1, 1, 16) == pytest.approx(0.25)
    assert times.of(1, 1, 1) == pytest.approx(0.1)
    assert times.of(1, 4, 4) == pytest.approx(0.28 - 0.15 * 12 / 15)
    # Room for many tokens that never come is not taken where it costs much.
    unlike = text([5, 9, 2, 7, 4, 8, 3, 6, 1] * 5)
    found = forecast([unlike], "auto", 1, times, LONGEST, pads=True)
    assert found.tokens_per_second == pytest.approx(10, rel=0.1)


def test_noise_makes_no_cycle_take_less_than_nothing() -> None:
    # Long steps were measured as faster ones.
    times = CycleTimes({1: {1: 0.5, 16: 0.2}}, room=16, plain=CycleTimes({1: {1: 0.1}}))
    assert times.of(1, 16, 1) == pytest.approx(0.1)
    assert times.of(1, 16, 16) == pytest.approx(0.2)
    assert CycleTimes({1: {1: 0.3, 2: 0.2}}).of(1, 16) == pytest.approx(0.02)

"""Predictors, and the chains and trees that are drafted from what they expect."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from split_device.speculation.combined import CombinedPredictor
from split_device.speculation.recycle import COMMON, SHARE, SUCCESSORS, RecyclePredictor, Successors
from split_device.speculation.suffix import MISSED, SuffixAutomaton, SuffixPredictor
from split_device.speculation.tree import LEAST_CHANCE, DraftTree, PredictedDrafter

VOCABULARY = 60

TEXTS = st.lists(st.integers(0, 2), max_size=60)


def latest(text: list[int], guess: list[int]) -> tuple[int, int] | None:
    """The longest end of text and guess that something follows in the text, found by comparing every place.

    Returns its length, and the index of what followed its latest occurrence.
    """
    whole = [*text, *guess]
    for length in range(len(whole), 0, -1):
        for begin in range(len(text) - length - 1, -1, -1):
            if text[begin : begin + length] == whole[len(whole) - length :]:
                return length, begin + length
    return None


def chain(text: list[int], limit: int) -> list[int]:
    """What suffixes draft, found in this way."""
    guess: list[int] = []
    chance = 1.0
    while len(guess) < limit and (found := latest(text, guess)) is not None:
        length, following = found
        chance *= 1 - MISSED / (length + 1)
        if chance < LEAST_CHANCE:
            break
        guess.append(text[following])
    return guess


def learned(seed: int, tokens: list[int]) -> Successors:
    successors = Successors()
    logits = torch.randn(len(tokens), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    successors.learn(tokens, 3 * logits)
    return successors


def combined(text: list[int], seed: int) -> PredictedDrafter[object]:
    predictor = CombinedPredictor(SuffixPredictor(), RecyclePredictor(learned(seed, [0, 1, 2, 0])))
    predictor.extend(text)
    return PredictedDrafter(predictor)  # type: ignore[arg-type]


@given(TEXTS, st.integers(0, 60), st.integers(0, 20))
def test_suffixes_find_what_comparing_every_place_finds(text: list[int], cut: int, limit: int) -> None:
    drafter = PredictedDrafter(SuffixPredictor())
    drafter.extend(text[:cut])
    drafter.draft(limit)
    drafter.extend(text[cut:])
    assert drafter.draft(limit) == chain(text, limit)


@given(TEXTS, st.lists(st.integers(0, 3), max_size=6))
def test_a_match_follows_a_guess_that_the_text_does_not_go_on_with(text: list[int], guess: list[int]) -> None:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.extend(token)
    match = automaton.end()
    for index, token in enumerate(guess):
        match = automaton.after(match, token)
        found = latest(text, guess[: index + 1])
        assert match.length == (found[0] if found else 0)
        assert automaton.next(match) == (text[found[1]] if found else None)


def test_a_longer_match_drafts_more() -> None:
    text = list(range(100, 140))
    drafted = []
    for length in (1, 3, 10):
        drafter = PredictedDrafter(SuffixPredictor())
        drafter.extend([*text, 1, *text[:length]])
        draft = drafter.draft(30)
        assert draft == text[length : length + len(draft)]
        drafted.append(len(draft))
    assert 0 < drafted[0] < drafted[1] < drafted[2]


@given(st.lists(st.integers(0, 2), max_size=100))
def test_suffixes_forget_what_is_long_ago(text: list[int]) -> None:
    window = 8
    predictor = SuffixPredictor(window)
    predictor.extend(text)
    kept = len(text) if len(text) < 2 * window else window + (len(text) - window) % window
    fresh = SuffixPredictor(1000)
    fresh.extend(text[len(text) - kept :])
    assert PredictedDrafter(predictor).draft(9) == PredictedDrafter(fresh).draft(9)


def test_successors_are_averages_of_what_was_expected() -> None:
    successors = Successors()
    certain = torch.full((1, VOCABULARY), -100.0)
    certain[0, 7] = 100.0
    successors.learn([3], certain)
    assert successors.expected(3) == {7: pytest.approx(1.0)}
    assert successors.expected(4) == {7: pytest.approx(1.0)}, "what comes after any token"
    certain = certain.roll(1, dims=1)
    successors.learn([3], certain)
    successors.learn([4], certain)
    expected = successors.expected(3)
    assert set(expected) == {7, 8}
    assert expected[7] == pytest.approx(SHARE * 0.5 + (1 - SHARE) * 0.97**2)
    assert sum(expected.values()) == pytest.approx(1.0)


def test_what_was_learned_is_bounded() -> None:
    successors = Successors(most_tokens=3)
    for seed, token in enumerate((0, 1, 2, 0, 3)):
        logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        successors.learn([token], logits)
        assert len(successors) <= 3
        assert len(successors.expected(token)) <= SUCCESSORS + COMMON
    # Token 1 was seen longest ago: only what comes after any token is known.
    assert successors.expected(1) == successors.expected(-1) != successors.expected(0)
    for seed in range(20):
        successors.learn([5], torch.randn(1, 1000, generator=torch.Generator().manual_seed(seed)))
    assert len(successors.expected(-1)) == COMMON


def test_requests_share_what_was_learned() -> None:
    successors = learned(1, [0, 1])
    first, second = (PredictedDrafter(RecyclePredictor(successors)) for _ in range(2))
    first.extend([5, 0])
    second.extend([1, 0])
    assert first.draft(5) == second.draft(5) != []
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 44] = 50.0
    first.learn([0], logits)
    first.learn([0], logits)
    assert second.draft(1) == [44]


@given(TEXTS, st.integers(0, 5), st.integers(0, 40))
def test_a_tree_begins_with_beginnings_and_keeps_its_budget(text: list[int], seed: int, budget: int) -> None:
    tree = combined(text, seed).draft_tree(budget)
    assert len(tree.tokens) == len(tree.parents) == budget, "something is always expected"
    assert all(-1 <= parent < node for node, parent in enumerate(tree.parents))
    assert len(set(zip(tree.parents, tree.tokens, strict=True))) == budget, "a continuation is there once"


@given(TEXTS, st.integers(0, 5))
def test_a_larger_tree_has_all_of_a_smaller_one(text: list[int], seed: int) -> None:
    drafter = combined(text, seed)
    small, large = drafter.draft_tree(7), drafter.draft_tree(20)
    assert large.tokens[:7] == small.tokens
    assert large.parents[:7] == small.parents


@given(TEXTS, st.integers(0, 5))
def test_a_tree_has_the_largest_chances(text: list[int], seed: int) -> None:
    predictor = CombinedPredictor(SuffixPredictor(), RecyclePredictor(learned(seed, [0, 1, 2])))
    predictor.extend(text)
    tree = PredictedDrafter(predictor).draft_tree(12)
    # Every path of up to two tokens, with its chance.
    chances: list[float] = []
    inside: list[float] = []
    children = {edge: node for node, edge in enumerate(zip(tree.parents, tree.tokens, strict=True))}
    end = predictor.end()
    for token, chance in predictor.expected(end).items():
        node = children.get((-1, token))
        (chances if node is None else inside).append(chance)
        for second, share in predictor.expected(predictor.after(end, token)).items():
            there = node is not None and (node, second) in children
            (inside if there else chances).append(chance * share)
    assert min(inside) >= max(chances) - 1e-12


def test_the_path_of_a_tree_that_follows() -> None:
    #   5 ─ 6 ─ 7
    #   │   └── 8
    #   9
    tree = DraftTree([5, 6, 9, 7, 8], [-1, 0, -1, 1, 1])
    assert tree.matched([5, 6, 8, 1]) == 3
    assert tree.matched([5, 6]) == 2
    assert tree.matched([9, 6]) == 1
    assert tree.matched([6]) == 0
    assert DraftTree().matched([1]) == 0


def test_what_one_predictor_leaves_open_the_other_one_fills() -> None:
    successors = learned(3, [2])
    predictor = CombinedPredictor(SuffixPredictor(), RecyclePredictor(successors))
    predictor.extend([2, 1, 2])
    found = 1 - MISSED / 2
    expected = predictor.expected(predictor.end())
    assert expected[1] == pytest.approx(found + (1 - found) * successors.expected(2).get(1, 0.0))
    assert sum(expected.values()) == pytest.approx(found + (1 - found) * sum(successors.expected(2).values()))

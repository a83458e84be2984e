"""Drafters: what they guess, and that a guess never exceeds what was asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from split_common.errors import ConfigError
from split_device.speculation.drafters import DRAFTERS, make_drafter
from split_device.speculation.names import AUTO, MTP, OFF, SPECULATE
from split_device.speculation.ngram import LONGEST, SHORTEST, NgramDrafter
from split_device.speculation.recycle import Successors

TEXTS = st.lists(st.integers(0, 2), max_size=40)


def looked_up(text: list[int], limit: int) -> list[int]:
    """What prompt lookup drafts, found by comparing every place."""
    for length in range(min(LONGEST, len(text)), SHORTEST - 1, -1):
        for begin in range(len(text) - length - 1, -1, -1):
            if text[begin : begin + length] == text[len(text) - length :]:
                period = text[begin + length :]
                return (period * limit)[:limit]
    return []


@given(TEXTS, st.integers(0, 40), st.integers(0, 9))
def test_prompt_lookup_finds_what_comparing_every_place_finds(text: list[int], cut: int, limit: int) -> None:
    drafter = NgramDrafter()
    drafter.extend(text[:cut])
    drafter.draft(limit)
    drafter.extend(text[cut:])
    assert drafter.draft(limit) == looked_up(text, limit)


@pytest.mark.parametrize("name", DRAFTERS)
@given(text=TEXTS, limit=st.integers(0, 9))
def test_a_draft_has_known_tokens_and_is_not_too_long(name: str, text: list[int], limit: int) -> None:
    drafter = make_drafter(name, Successors())
    drafter.extend(text)
    draft = drafter.draft(limit)
    assert len(draft) <= limit
    assert set(draft) <= set(text)


def test_what_may_be_asked_for_is_what_there_is() -> None:
    assert sorted(SPECULATE) == sorted([AUTO, OFF, *DRAFTERS, MTP])


def test_there_is_no_drafter_of_another_name() -> None:
    with pytest.raises(ConfigError, match="invalid speculate 'eagle': expected one of ngram, suffix"):
        make_drafter("eagle", Successors())

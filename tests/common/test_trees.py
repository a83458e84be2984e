"""Trees of tokens: who sees whom, and what is not a tree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_engine import make_runner

from split_common.engine import sdpa
from split_common.engine.trees import Kept, depths, is_chain, is_path, is_tree, seen_in_tree

PARENTS = st.lists(st.integers(0, 50), max_size=12).map(
    lambda draws: [draw % (node + 1) - 1 for node, draw in enumerate(draws)]
)


def ancestors(parents: list[int], node: int) -> set[int]:
    """The node and all before it on its path."""
    return {node} | (ancestors(parents, parents[node]) if parents[node] >= 0 else set())


@given(PARENTS, st.integers(0, 6), st.none() | st.integers(1, 9))
def test_a_token_sees_its_path_as_far_as_its_window_reaches(
    parents: list[int], past: int, window: int | None
) -> None:
    seen = seen_in_tree(parents, past, window)
    assert seen.shape == (len(parents), past + len(parents))
    for node, row in enumerate(seen.tolist()):
        path = [*range(past), *(past + each for each in sorted(ancestors(parents, node)))]
        assert [key for key, sees in enumerate(row) if sees] == path[-(window or len(path)) :]
        assert depths(parents)[node] == len(path) - past - 1


def test_what_a_tree_and_a_path_are() -> None:
    assert is_tree([-1, -1, 0, 2])
    assert is_tree([])
    assert not is_tree([0])
    assert not is_tree([-1, 1])
    assert not is_tree([-2])
    assert is_chain([-1, 0, 1])
    assert not is_chain([-1, -1])
    assert is_path([0, 2, 5])
    assert is_path([])
    assert not is_path([0, 0])
    assert not is_path([2, 1])
    assert not is_path([-1])


def test_what_stays_is_kept_once() -> None:
    calls = []

    class Sequence:
        def keep(self, begin: int, kept: object) -> None:
            calls.append((begin, kept))

    kept = Kept(4, (0, 2))
    kept.apply(Sequence())
    kept.apply(Sequence())
    assert calls == [(4, (0, 2))]


def test_layers_whose_trees_are_wrong_take_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_runner(tmp_path / "right", "llama").takes_trees
    # Every token sees those before it, also those of other branches.
    monkeypatch.setattr(
        sdpa, "seen_in_tree", lambda parents, past, _: torch.ones(len(parents), past + len(parents)).tril(past) > 0
    )
    runner = make_runner(tmp_path / "wrong", "llama")
    assert runner.unpacked_because is None
    assert not runner.takes_trees

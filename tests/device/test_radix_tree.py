"""The radix tree of the prefix cache, against one that compares every key."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from split_device.generation.radix_tree import RadixTree

KEYS = st.lists(st.integers(0, 2), max_size=9)
#: Keys to store and keys to take out.
CHANGES = st.lists(st.tuples(st.booleans(), KEYS), max_size=40)


def shared(one: Sequence[int], two: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


@given(CHANGES, st.lists(KEYS, max_size=10))
def test_it_finds_what_comparing_every_key_finds(
    changes: list[tuple[bool, list[int]]], asked: list[list[int]]
) -> None:
    tree, naive = RadixTree[int](), dict[tuple[int, ...], int]()
    for number, (store, key) in enumerate(changes):
        if store:
            assert tree.put(key, number) == naive.get(tuple(key))
            naive[tuple(key)] = number
        else:
            assert tree.take(key) == naive.pop(tuple(key), None)
        assert len(tree) == len(naive)
        assert sorted(tree) == sorted(naive.values())
        # Each beginning is stored once.
        assert tree.tokens == len({key[:end] for key in naive for end in range(1, len(key) + 1)})
    for tokens in asked:
        length, found = tree.longest(tokens)
        assert length == max((shared(key, tokens) for key in naive), default=0)
        assert sorted(found) == sorted(value for key, value in naive.items() if shared(key, tokens) >= length)
        wholes = sorted((len(key), value) for key, value in naive.items() if shared(key, tokens) == len(key))
        assert tree.beginnings(tokens) == wholes

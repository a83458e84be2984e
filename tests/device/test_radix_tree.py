"""The radix tree and the cache of prefixes, against what comparing every key finds."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from split_device.generation.prefix_cache import PrefixCache
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


class Kept:
    def __init__(self) -> None:
        self.freed = 0

    def free(self) -> None:
        self.freed += 1


@given(
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(["put", "find", "evict"]), st.integers(0, 1), KEYS), max_size=40),
    st.integers(0, 30),
)
def test_the_cache_finds_the_longest_beginning_and_holds_no_more_than_it_may(
    whole: bool, changes: list[tuple[str, int, list[int]]], memory: int
) -> None:
    cache = PrefixCache[Kept](2 * memory, 2, whole=whole)
    every: dict[Kept, tuple[int, list[int]]] = {}
    for change, scope, tokens in changes:
        if change == "put":
            every[entry := Kept()] = scope, tokens
            cache.put(scope, tokens, entry)
        elif change == "evict":
            kept = any(not entry.freed for entry in every)
            assert cache.evict() == kept
        held = {entry: key for entry, (where, key) in every.items() if not entry.freed and where == scope}
        lengths = {entry: shared(key, tokens) for entry, key in held.items()}
        found = cache.find(scope, tokens)
        if change == "find":
            of_use = [n for entry, n in lengths.items() if n and (not whole or n == len(held[entry]))]
            assert (found[1] if found else 0) == max(of_use, default=0)
            assert found is None or lengths[found[0]] == found[1]
        assert all(entry.freed <= 1 for entry in every)
        assert len(cache) == sum(not entry.freed for entry in every)
        stored = {
            (where, *key[:end]) for entry, (where, key) in every.items() if not entry.freed for end in range(1, 10)
        }
        assert cache.held_bytes <= 2 * memory
        assert cache.held_bytes <= 2 * len(stored)
    cache.clear()
    assert all(entry.freed == 1 for entry in every)

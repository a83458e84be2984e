"""The KV pool: pages are counted, shared and copied on write."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from split_common.engine.pool import DEFAULT_PAGE_TOKENS, LayerShape, OutOfPages, PagedSequence, PagePool


def make_pool(pages: int = 8) -> PagePool:
    return PagePool({3: LayerShape(1, 2, 2)}, pages, torch.float32)


def write(pool: PagePool, sequence: PagedSequence, tokens: int, value: float) -> None:
    slots = torch.from_numpy(sequence.append(tokens))
    keys, values = pool.layers[3]
    keys[slots] = value
    values[slots] = -value


def read(pool: PagePool, sequence: PagedSequence) -> list[float]:
    keys, values = pool.layers[3]
    slots = torch.from_numpy(sequence.slots())
    assert torch.equal(keys[slots], -values[slots])
    return [float(key) for key in keys[slots][:, 0, 0]]


def test_a_sequence_grows_in_place_while_its_neighbour_is_free() -> None:
    pool = make_pool()
    sequence = pool.new_sequence()
    for _ in range(3 * DEFAULT_PAGE_TOKENS):
        write(pool, sequence, 1, 1.0)
    assert sequence.contiguous
    assert sequence.pages.tolist() == [0, 1, 2]


def test_a_second_sequence_leaves_the_first_room_to_grow() -> None:
    pool = make_pool()
    first, second = pool.new_sequence(), pool.new_sequence()
    write(pool, first, 1, 1.0)
    write(pool, second, 1, 2.0)
    write(pool, first, 3 * DEFAULT_PAGE_TOKENS, 1.0)
    assert first.contiguous
    assert second.contiguous


def test_a_fork_shares_pages_until_one_of_the_two_writes() -> None:
    pool = make_pool()
    first = pool.new_sequence()
    write(pool, first, DEFAULT_PAGE_TOKENS + 4, 1.0)
    second = first.fork()
    assert pool.free == 6
    write(pool, second, 1, 2.0)
    assert pool.free == 5
    write(pool, first, 1, 3.0)
    assert read(pool, first) == [1.0] * (DEFAULT_PAGE_TOKENS + 4) + [3.0]
    assert read(pool, second) == [1.0] * (DEFAULT_PAGE_TOKENS + 4) + [2.0]
    first.free()
    second.free()
    assert pool.free == 8


def test_pages_are_freed_with_the_last_sequence_that_has_them() -> None:
    pool = make_pool()
    first = pool.new_sequence()
    write(pool, first, DEFAULT_PAGE_TOKENS + 4, 1.0)
    second, alone = first.fork(), pool.new_sequence()
    write(pool, alone, 1, 2.0)
    assert pool.freed_by([]) == pool.freed_by([first]) == pool.freed_by([second]) == 0
    assert pool.freed_by([first, alone]) == DEFAULT_PAGE_TOKENS
    assert pool.freed_by([first, second]) == pool.held_by([first, second]) == 2 * DEFAULT_PAGE_TOKENS
    assert pool.held_by([first]) == pool.held_by([second]) == 2 * DEFAULT_PAGE_TOKENS
    write(pool, second, 1, 3.0)
    # Each has a last page of its own now, and the first page is shared.
    assert pool.freed_by([first]) == DEFAULT_PAGE_TOKENS
    before = pool.free_tokens
    expected = pool.freed_by([first, second])
    first.free()
    second.free()
    assert pool.free_tokens - before == expected == 3 * DEFAULT_PAGE_TOKENS


@given(
    st.integers(0, 40),
    st.sets(st.integers(0, 20)),
    st.integers(0, 3),
    st.booleans(),
)
def test_what_is_kept_moves_to_the_front(past: int, chosen: set[int], more: int, shared: bool) -> None:
    pool = make_pool()
    sequence = pool.new_sequence()
    for token in range(past + 21):
        write(pool, sequence, 1, float(token))
    whole = read(pool, sequence)
    twin = sequence.fork() if shared else None
    kept = sorted(chosen)
    free, cost = pool.free, sequence.cost_after(past, kept, more)
    sequence.keep(past, kept)
    write(pool, sequence, more, 99.0)
    assert free - pool.free <= max(0, cost)
    assert read(pool, sequence) == [*whole[:past], *(whole[past + index] for index in kept), *[99.0] * more]
    assert twin is None or read(pool, twin) == whole
    sequence.free()
    if twin is not None:
        twin.free()
    assert pool.free == pool.pages


def test_a_full_pool_keeps_what_it_can_without_pages() -> None:
    pool = make_pool(pages=1)
    sequence = pool.new_sequence()
    for token in range(4):
        write(pool, sequence, 1, float(token))
    twin = sequence.fork()
    with pytest.raises(OutOfPages):
        sequence.keep(1, [1])
    assert read(pool, sequence) == read(pool, twin) == [0.0, 1.0, 2.0, 3.0]
    sequence.keep(1, [0])
    assert read(pool, sequence) == [0.0, 1.0]
    twin.free()
    sequence.keep(0, [1])
    assert read(pool, sequence) == [1.0]


def test_a_full_pool_refuses_and_changes_nothing() -> None:
    pool = make_pool(pages=2)
    first, second = pool.new_sequence(), pool.new_sequence()
    write(pool, first, DEFAULT_PAGE_TOKENS, 1.0)
    write(pool, second, 3, 2.0)
    with pytest.raises(OutOfPages):
        first.append(1)
    with pytest.raises(OutOfPages):
        second.append(DEFAULT_PAGE_TOKENS)
    assert read(pool, first) == [1.0] * DEFAULT_PAGE_TOKENS
    assert read(pool, second) == [2.0] * 3


Operation = tuple[str, int, int]
operations = st.lists(
    st.tuples(
        st.sampled_from(["new", "append", "truncate", "fork", "free"]), st.integers(0, 7), st.integers(0, 40)
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(operations)
def test_whatever_is_done_every_sequence_reads_what_was_written_to_it(steps: list[Operation]) -> None:
    pool = make_pool(pages=12)
    rows: list[tuple[PagedSequence, list[float]]] = []
    for number, (name, pick, amount) in enumerate(steps):
        if name == "new" or not rows:
            rows.append((pool.new_sequence(), []))
            continue
        sequence, expected = rows[pick % len(rows)]
        if name == "append":
            fits = sequence.cost(amount) <= pool.free
            if fits:
                write(pool, sequence, amount, float(number))
                expected += [float(number)] * amount
            else:
                with pytest.raises(OutOfPages):
                    sequence.append(amount)
        elif name == "truncate":
            keep = min(amount, len(expected))
            sequence.truncate(keep)
            del expected[keep:]
        elif name == "fork":
            rows.append((sequence.fork(), list(expected)))
        else:
            sequence.free()
            rows.pop(pick % len(rows))
        for each, content in rows:
            assert read(pool, each) == content
            assert each.contiguous == all(b == a + 1 for a, b in zip(each.pages, each.pages[1:], strict=False))
    used = {page for each, _ in rows for page in each.pages}
    assert pool.free == pool.pages - len(used)
    for each, _ in rows:
        each.free()
    assert pool.free == pool.pages

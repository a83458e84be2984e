"""The KV pool: pages of tokens, allocated once, counted by reference, copied on write.

A sequence grows into the page after its last one if that is free. While its pages are contiguous, its keys and
values are one slice, which attention reads without a copy. A new sequence starts in the middle of the largest gap,
so that it and its neighbours can grow.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from split_common.engine.trees import in_place

#: Tokens in a page, unless the attention backend requires another number.
DEFAULT_PAGE_TOKENS = 16

#: Contiguous free pages that a new sequence should find; the pool uses more of its memory if there is no such gap.
GAP_PAGES = 64


class OutOfPages(Exception):
    """The pool has too few free pages. Nothing was changed."""


@dataclass(frozen=True)
class LayerShape:
    """The shape of one layer's keys and values for one token, and their device."""

    heads: int
    key_width: int
    value_width: int
    device: torch.device | str = "cpu"

    @property
    def elements(self) -> int:
        """Numbers in the keys and values of one token."""
        return self.heads * (self.key_width + self.value_width)


@dataclass(eq=False)
class PagedSequence:
    """A sequence whose tokens are in pages of a pool (a `KVSequence`)."""

    pool: PagePool
    #: In an array, because many sequences may share many pages.
    pages: array[int] = field(default_factory=lambda: array("q"))
    length: int = 0
    #: Whether its pages are adjacent and in order.
    contiguous: bool = True

    def truncate(self, tokens: int) -> None:
        """Cuts the sequence back to its first `tokens` tokens."""
        keep = -(-tokens // self.pool.page_tokens)
        self.pool.release(self.pages[keep:])
        del self.pages[keep:]
        self.length = tokens
        self.contiguous = self.contiguous or _follow(self.pages)

    def keep(self, begin: int, kept: Sequence[int]) -> None:
        """Drops all tokens from index `begin` on but those with these indices, counted from there, ascending.

        Those that stay move to the front, in pages of this sequence alone.

        Raises:
            OutOfPages: the pool has too few free pages. The sequence is unchanged.
        """
        first, end = begin + in_place(kept), begin + len(kept)
        if first < end:
            shared = self._shared_pages(first, end)
            if len(shared) > self.pool.free:
                raise OutOfPages
            sources = self.slots(begin)[list(kept)[first - begin :]]
            for index in shared:
                page = self.pages[index]
                self.pages[index] = self.pool.copy(
                    page, self.pool.page_tokens, self.pages[index - 1] if index else None
                )
                self.pool.release([page])
            if shared:
                self.contiguous = _follow(self.pages)
            self.pool.move(sources, self.slots(first)[: end - first])
        self.truncate(end)

    def cost_after(self, begin: int, kept: Sequence[int], tokens: int) -> int:
        """How many pages keeping these tokens, and then appending `tokens` tokens, takes from the pool."""
        first, end = begin + in_place(kept), begin + len(kept)
        copied = self._shared_pages(first, end)
        # The last page is written to in any case, unless it is full.
        if tokens and end % self.pool.page_tokens and end == first:
            copied = self._shared_pages(end - 1, end)
        return len(copied) + self._pages(end + tokens) - self._pages(end)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.pool.page_tokens)

    def _shared_pages(self, begin: int, end: int) -> list[int]:
        """Which of its pages that hold the tokens `[begin, end)` are shared: their indices."""
        size = self.pool.page_tokens
        pages = range(begin // size, -(-end // size)) if begin < end else ()
        return [index for index in pages if self.pool.is_shared(self.pages[index])]

    def fork(self) -> PagedSequence:
        """Returns a sequence with the same tokens. The two share each page until one of them writes to it."""
        self.pool.share(self.pages)
        return PagedSequence(self.pool, self.pages[:], self.length, self.contiguous)

    def free(self) -> None:
        """Returns all pages to the pool."""
        self.truncate(0)

    def cost(self, tokens: int) -> int:
        """How many pages appending `tokens` tokens takes from the pool."""
        more = -(-(self.length + tokens) // self.pool.page_tokens) - len(self.pages)
        return more + (tokens > 0 and self._shares_last_page())

    def append(self, tokens: int) -> np.ndarray:
        """Takes pages for `tokens` more tokens.

        Returns:
            Their slots in the pool, int64 `[tokens]`.

        Raises:
            OutOfPages: the pool has too few free pages. The sequence is unchanged.
        """
        if self.cost(tokens) > self.pool.free:
            raise OutOfPages
        if tokens and self._shares_last_page():
            shared = self.pages[-1]
            self.pages[-1] = self.pool.copy(shared, self.length % self.pool.page_tokens, self._before_last())
            self.pool.release([shared])
            self.contiguous = _follow(self.pages)
        while len(self.pages) * self.pool.page_tokens < self.length + tokens:
            page = self.pool.take(self.pages[-1] if self.pages else None)
            self.contiguous = self.contiguous and (not self.pages or page == self.pages[-1] + 1)
            self.pages.append(page)
        begin, self.length = self.length, self.length + tokens
        return self.slots(begin)

    def slots(self, begin: int = 0) -> np.ndarray:
        """The slots of the tokens from `begin` on, int64 `[length - begin]`."""
        if begin == self.length - 1:
            size = self.pool.page_tokens
            return np.array([self.pages[begin // size] * size + begin % size])
        page, offset = np.divmod(np.arange(begin, self.length), self.pool.page_tokens)
        return np.asarray(self.pages, dtype=np.int64)[page] * self.pool.page_tokens + offset

    def _before_last(self) -> int | None:
        return self.pages[-2] if len(self.pages) > 1 else None

    def _shares_last_page(self) -> bool:
        return bool(self.length % self.pool.page_tokens) and self.pool.is_shared(self.pages[-1])


class PagePool:
    """Keys and values of all sequences of one range of layers (a `KVStore`).

    Args:
        shapes: the shape of each layer's keys and values, by layer index.
        pages: how many pages to allocate.
        dtype: of keys and values.
        page_tokens: tokens in a page; None for the default.
    """

    def __init__(
        self, shapes: dict[int, LayerShape], pages: int, dtype: torch.dtype, page_tokens: int | None = None
    ) -> None:
        #: Tokens in a page.
        self.page_tokens = page_tokens or DEFAULT_PAGE_TOKENS
        tokens = pages * self.page_tokens
        #: Keys `[tokens, heads, key_width]` and values `[tokens, heads, value_width]` of each layer.
        self.layers = {
            index: (
                torch.empty(tokens, shape.heads, shape.key_width, dtype=dtype, device=shape.device),
                torch.empty(tokens, shape.heads, shape.value_width, dtype=dtype, device=shape.device),
            )
            for index, shape in shapes.items()
        }
        self.pages = pages
        #: Number of free pages.
        self.free = pages
        self._reserved = 0
        # How many pages are used, from the first on. It grows on demand, because the operating system gives memory
        # only to pages that are written to.
        self._span = min(GAP_PAGES, pages)
        self._references = np.zeros(pages, dtype=np.int32)

    def storage(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's storage of keys and of values, each `[slots, heads, width]`.

        Args:
            layer: the layer's index.
            key, value: new keys and values `[1, heads, tokens, width]`, which tell their shapes.
        """
        return self.layers[layer]

    @staticmethod
    def bytes_per_token(shapes: dict[int, LayerShape], dtype: torch.dtype) -> int:
        """Bytes that a token takes in all layers."""
        return sum(shape.elements for shape in shapes.values()) * dtype.itemsize

    sequence_tokens = 0

    @property
    def capacity(self) -> int:
        """Tokens that fit into the pool."""
        return (self.pages - self._reserved) * self.page_tokens

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes in all layers."""
        return sum(keys[:1].nbytes + values[:1].nbytes for keys, values in self.layers.values())

    @property
    def free_tokens(self) -> int:
        """Tokens that fit into the free pages."""
        return self.free * self.page_tokens

    def held_by(self, sequences: Sequence[PagedSequence]) -> int:
        """Tokens that fit into the pages of these sequences of it. Any thread may call it."""
        return int(np.count_nonzero(_owners(sequences))) * self.page_tokens

    def freed_by(self, sequences: Sequence[PagedSequence]) -> int:
        """Tokens that would be free besides, without these sequences of it. What others share with them stays.

        Any thread may call it.
        """
        owners = _owners(sequences)
        return int(((owners > 0) & (self._references[: len(owners)] <= owners)).sum()) * self.page_tokens

    def reserve(self) -> int:
        """Takes a page that no sequence will own. Raises OutOfPages if none is free."""
        self._reserved += 1
        return self.take(None)

    def new_sequence(self) -> PagedSequence:
        return PagedSequence(self)

    def take(self, after: int | None) -> int:
        """Takes a free page, preferably the one after `after`. Raises OutOfPages if none is free."""
        if after is not None and after + 1 < self.pages and not self._references[after + 1]:
            page = after + 1
        else:
            page = self._middle_of_largest_gap()
        self._references[page] = 1
        self.free -= 1
        return page

    def copy(self, page: int, tokens: int, after: int | None) -> int:
        """Copies the first `tokens` tokens of a shared page to a new page, preferably the one after `after`."""
        twin = self.take(after)
        source, target = page * self.page_tokens, twin * self.page_tokens
        for keys, values in self.layers.values():
            keys[target : target + tokens] = keys[source : source + tokens]
            values[target : target + tokens] = values[source : source + tokens]
        return twin

    @torch.inference_mode()
    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copies the tokens in some slots to others, int64 `[tokens]` each. Sources may be among the targets."""
        for keys, values in self.layers.values():
            here, there = (torch.from_numpy(slots).to(keys.device) for slots in (sources, targets))
            for storage in (keys, values):
                storage.index_copy_(0, there, storage.index_select(0, here))

    def share(self, pages: array[int]) -> None:
        """Adds an owner to each page."""
        self._references[pages] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Removes an owner from each page. Pages without owners are free."""
        if pages:
            indices = np.asarray(pages)
            self._references[indices] -= 1
            self.free += int((self._references[indices] == 0).sum())

    def is_shared(self, page: int) -> bool:
        return bool(self._references[page] > 1)

    def _middle_of_largest_gap(self) -> int:
        """A free page in the used part of the pool, which grows while it has no gap of `GAP_PAGES` pages."""
        while True:
            used = np.flatnonzero(self._references[: self._span])
            edges = np.concatenate(([-1], used, [self._span]))
            gaps = np.diff(edges) - 1
            largest = int(gaps.argmax())
            if gaps[largest] >= GAP_PAGES or self._span == self.pages:
                break
            self._span = min(2 * self._span, self.pages)
        if gaps[largest] < 1:
            raise OutOfPages
        # No sequence can grow into a gap at the start of the pool, so that gap is filled from its start.
        first = int(edges[largest]) + 1
        return first if largest == 0 else first + int(gaps[largest]) // 2


def _follow(pages: Sequence[int]) -> bool:
    return all(later == earlier + 1 for earlier, later in itertools.pairwise(pages))


def _owners(sequences: Sequence[PagedSequence]) -> np.ndarray:
    """How many of these sequences have each page, by the page's number, up to the last page that one has."""
    pages = b"".join([sequence.pages.tobytes() for sequence in sequences])
    return np.bincount(np.frombuffer(pages, dtype=np.int64))


class ProbePool(PagePool):
    """A small pool that learns each layer's shape from its first keys and values."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        super().__init__({}, pages, torch.float32, page_tokens)
        self.shapes: dict[int, LayerShape] = {}

    def storage(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self.shapes:
            self.shapes[layer] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1], key.device)
            size = (self.capacity, key.shape[1])
            self.layers[layer] = key.new_zeros(*size, key.shape[-1]), value.new_zeros(*size, value.shape[-1])
        return self.layers[layer]

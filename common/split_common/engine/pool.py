"""The KV pool: pages of tokens, allocated once, counted by reference, copied on write.

A sequence's pages follow one another in memory whenever the neighbouring page is free, so that its keys and values
are one slice and attention needs no copy of them; new sequences start in the middle of the largest gap for that
reason. Where pages are scattered, they are gathered.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch

from split_common.engine.rows import Row

#: Tokens of a page, unless the attention that reads it wants others.
PAGE_TOKENS = 16


#: Pages in a row that are free where a new sequence begins, if possible.
ROOM = 64


class OutOfPages(Exception):
    """The pool has no page left; nothing was changed."""


@dataclass(frozen=True)
class LayerShape:
    """Shape of one layer's keys and values for a token."""

    heads: int
    key_width: int
    value_width: int
    device: torch.device | str = "cpu"

    @property
    def elements(self) -> int:
        return self.heads * (self.key_width + self.value_width)


@dataclass(eq=False)
class PagedSequence:
    """One row of a session: the pages that hold its tokens."""

    pool: PagePool
    pages: list[int] = field(default_factory=list)
    length: int = 0
    #: Whether its pages follow one another in memory.
    contiguous: bool = True

    def truncate(self, tokens: int) -> None:
        """Cuts the sequence back to its first `tokens` tokens."""
        keep = -(-tokens // self.pool.page_tokens)
        self.pool.release(self.pages[keep:])
        del self.pages[keep:]
        self.length = tokens
        self.contiguous = self.contiguous or _follow(self.pages)

    def fork(self) -> PagedSequence:
        """A sequence with the same tokens; pages are shared until one of the two writes to them."""
        self.pool.share(self.pages)
        return PagedSequence(self.pool, list(self.pages), self.length, self.contiguous)

    def free(self) -> None:
        """Gives all pages back."""
        self.truncate(0)

    def pages_to_append(self, tokens: int) -> int:
        """Pages that appending `tokens` tokens would take from the pool."""
        more = -(-(self.length + tokens) // self.pool.page_tokens) - len(self.pages)
        return more + (tokens > 0 and self._shares_last_page())

    def append(self, tokens: int) -> np.ndarray:
        """Makes room for `tokens` more tokens.

        Returns:
            Their slots in the pool, int64 `[tokens]`.

        Raises:
            OutOfPages: the pool is full; the sequence is as it was.
        """
        if self.pages_to_append(tokens) > self.pool.free:
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
        """Slots of the tokens from `begin` on, int64."""
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
    """Keys and values of all sequences of one range of layers.

    Args:
        shapes: of each layer, by layer index.
        pages: how many pages to allocate.
        dtype: of keys and values.
        page_tokens: tokens of a page.
    """

    def __init__(
        self, shapes: dict[int, LayerShape], pages: int, dtype: torch.dtype, page_tokens: int | None = None
    ) -> None:
        #: Tokens of a page.
        self.page_tokens = page_tokens or PAGE_TOKENS
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
        #: Pages that are free.
        self.free = pages
        self._reserved = 0
        # Memory that was never written to costs nothing: pages are taken from the first so many while that does.
        self._span = min(ROOM, pages)
        self._references = np.zeros(pages, dtype=np.int32)

    def storage(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, for these new ones `[1, heads, tokens, width]`."""
        return self.layers[layer]

    @staticmethod
    def bytes_per_token(shapes: dict[int, LayerShape], dtype: torch.dtype) -> int:
        """What a token costs, over all layers."""
        return sum(shape.elements for shape in shapes.values()) * dtype.itemsize

    @property
    def capacity(self) -> int:
        """Tokens that the pool holds."""
        return (self.pages - self._reserved) * self.page_tokens

    @property
    def free_tokens(self) -> int:
        """Tokens that the free pages hold."""
        return self.free * self.page_tokens

    def reserve(self) -> int:
        """A page that no sequence will ever have. Raises OutOfPages."""
        self._reserved += 1
        return self.take(None)

    def new_row(self) -> PagedSequence:
        return PagedSequence(self)

    def cost(self, row: Row, tokens: int) -> int:
        """Pages that appending `tokens` tokens to a row takes."""
        return cast(PagedSequence, row).pages_to_append(tokens)

    def take(self, after: int | None) -> int:
        """A free page: the one that follows `after` if it is free."""
        if after is not None and after + 1 < self.pages and not self._references[after + 1]:
            page = after + 1
        else:
            page = self._middle_of_largest_gap()
        self._references[page] = 1
        self.free -= 1
        return page

    def copy(self, page: int, tokens: int, after: int | None) -> int:
        """A page of one's own with the first `tokens` tokens of another."""
        twin = self.take(after)
        source, target = page * self.page_tokens, twin * self.page_tokens
        for keys, values in self.layers.values():
            keys[target : target + tokens] = keys[source : source + tokens]
            values[target : target + tokens] = values[source : source + tokens]
        return twin

    def share(self, pages: list[int]) -> None:
        self._references[pages] += 1

    def release(self, pages: list[int]) -> None:
        self._references[pages] -= 1
        self.free += int((self._references[pages] == 0).sum()) if pages else 0

    def is_shared(self, page: int) -> bool:
        return bool(self._references[page] > 1)

    def _middle_of_largest_gap(self) -> int:
        """Of the part of the pool in use, which is made larger when no gap in it leaves a sequence room to grow."""
        while True:
            used = np.flatnonzero(self._references[: self._span])
            edges = np.concatenate(([-1], used, [self._span]))
            gaps = np.diff(edges) - 1
            largest = int(gaps.argmax())
            if gaps[largest] >= ROOM or self._span == self.pages:
                break
            self._span = min(2 * self._span, self.pages)
        if gaps[largest] < 1:
            raise OutOfPages
        # A gap that begins the pool is taken from its start: nothing grows into it.
        first = int(edges[largest]) + 1
        return first if largest == 0 else first + int(gaps[largest]) // 2


def _follow(pages: list[int]) -> bool:
    return all(later == earlier + 1 for earlier, later in itertools.pairwise(pages))


class ProbePool(PagePool):
    """A small pool that finds out the layers' shapes from the first keys and values that it is handed."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        super().__init__({}, pages, torch.float32, page_tokens)
        self.shapes: dict[int, LayerShape] = {}

    def storage(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self.shapes:
            self.shapes[layer] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1], key.device)
            room = (self.capacity, key.shape[1])
            self.layers[layer] = key.new_zeros(*room, key.shape[-1]), value.new_zeros(*room, value.shape[-1])
        return self.layers[layer]

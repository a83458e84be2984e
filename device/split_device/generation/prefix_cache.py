"""What ended requests leave behind, by their tokens: later requests begin with it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from split_device.generation.radix_tree import RadixTree

#: Most entries.
MAX_ENTRIES = 256


class Entry(Protocol):
    """What is kept under a key."""

    def free(self) -> None:
        """Frees what it holds. Called once, when it leaves the cache."""


E = TypeVar("E", bound=Entry)


class PrefixCache(Generic[E]):
    """Entries by their scope and tokens, the least recently used of which go. Not thread-safe.

    Args:
        memory: most bytes to hold.
        token_bytes: bytes of one token.
        entry_tokens: tokens whose memory each entry takes beside that of its own tokens.
        shared: whether entries share the memory of the beginning that their keys share.
        whole: whether an entry is of use for all its tokens alone, and not for the first of them.
    """

    def __init__(
        self, memory: int, token_bytes: int, *, entry_tokens: int = 0, shared: bool = True, whole: bool = False
    ) -> None:
        self._memory = memory
        self._token_bytes = token_bytes
        self._entry_tokens = entry_tokens
        self._shared = shared
        self._whole = whole
        #: By scope. None is empty.
        self._trees: dict[Hashable, RadixTree[E]] = {}
        #: The keys of entries, the least recently used first.
        self._keys: OrderedDict[E, tuple[Hashable, tuple[int, ...]]] = OrderedDict()
        #: Tokens of all keys together.
        self._key_tokens = 0

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def held_bytes(self) -> int:
        """Bytes that the entries hold."""
        tokens = sum(tree.tokens for tree in self._trees.values()) if self._shared else self._key_tokens
        return (tokens + self._entry_tokens * len(self)) * self._token_bytes

    def put(self, scope: Hashable, tokens: Sequence[int], entry: E) -> None:
        """Keeps an entry, and frees those that it makes useless: itself, if a longer one has its tokens."""
        tree = self._trees.setdefault(scope, RadixTree())
        if not self._whole:
            length, longer = tree.longest(tokens)
            if length == len(tokens) and (known := next(longer, None)) is not None:
                self._keys.move_to_end(known)
                entry.free()
                return
            for _, shorter in tree.beginnings(tokens):
                self.drop(shorter)
            tree = self._trees.setdefault(scope, RadixTree())
        old = tree.put(tokens, entry)
        if old is not None:
            self._forget(old)
        self._keys[entry] = scope, tuple(tokens)
        self._key_tokens += len(tokens)
        while len(self) > MAX_ENTRIES or self.held_bytes > self._memory:
            self.evict()

    def find(self, scope: Hashable, tokens: Sequence[int]) -> tuple[E, int] | None:
        """The entry with most of the tokens from the first on, and their number; None if there is none."""
        tree = self._trees.get(scope)
        if tree is None:
            return None
        if self._whole:
            length, entry = next(reversed(tree.beginnings(tokens)), (0, None))
        else:
            length, entries = tree.longest(tokens)
            # The most recently used one: its worker is the likeliest to hold it.
            order = {each: index for index, each in enumerate(self._keys)}
            entry = max(entries, key=lambda each: order[each], default=None)
        if not length or entry is None:
            return None
        self._keys.move_to_end(entry)
        return entry, length

    def drop(self, entry: E) -> None:
        """Frees an entry, if it is here."""
        if (key := self._keys.get(entry)) is not None:
            scope, tokens = key
            tree = self._trees[scope]
            tree.take(tokens)
            if not len(tree):
                del self._trees[scope]
            self._forget(entry)

    def _forget(self, entry: E) -> None:
        """Frees an entry that is in no tree."""
        _, tokens = self._keys.pop(entry)
        self._key_tokens -= len(tokens)
        entry.free()

    def evict(self) -> bool:
        """Frees the least recently used entry. Returns whether there was one."""
        if not self._keys:
            return False
        self.drop(next(iter(self._keys)))
        return True

    def clear(self) -> None:
        while self.evict():
            pass

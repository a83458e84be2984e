"""A radix tree: values under sequences of tokens, found by what a sequence begins with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

V = TypeVar("V")

_NONE: tuple[()] = ()


@dataclass(eq=False)
class _Node(Generic[V]):
    #: The tokens between the parent and this node; empty for the root alone.
    edge: tuple[int, ...]
    #: Holds the value, if there is one.
    values: tuple[V, ...] = _NONE
    #: By the first token of their edges.
    children: dict[int, _Node[V]] = field(default_factory=dict)

    def below(self) -> Iterator[V]:
        """The values here and below."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield from node.values
            waiting += node.children.values()


class RadixTree(Generic[V]):
    """Values by their keys, which are sequences of tokens. A beginning that keys share is stored once.

    Not thread-safe.
    """

    def __init__(self) -> None:
        self._root: _Node[V] = _Node(())
        self._count = 0
        #: Tokens that are stored.
        self.tokens = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[V]:
        return self._root.below()

    def put(self, key: Sequence[int], value: V) -> V | None:
        """Stores a value. Returns the one that was there under this key."""
        node, done, shared = self._walk(key)[-1]
        if shared < len(node.edge):
            node = self._split(node, shared)
        if rest := tuple(key[done:]):
            leaf: _Node[V] = _Node(rest)
            node.children[rest[0]] = leaf
            self.tokens += len(rest)
            node = leaf
        old, node.values = node.values, (value,)
        self._count += not old
        return old[0] if old else None

    def take(self, key: Sequence[int]) -> V | None:
        """Takes out the value under a key; None if there is none."""
        path = self._walk(key)
        node, done, shared = path[-1]
        if done < len(key) or shared < len(node.edge) or not node.values:
            return None
        (value,), node.values = node.values, _NONE
        self._count -= 1
        for (child, *_), (parent, *_) in zip(reversed(path[1:]), reversed(path[:-1]), strict=True):
            if not child.values and not child.children:
                del parent.children[child.edge[0]]
                self.tokens -= len(child.edge)
            elif not child.values and len(child.children) == 1:
                (only,) = child.children.values()
                only.edge = child.edge + only.edge
                parent.children[only.edge[0]] = only
        return value

    def longest(self, tokens: Sequence[int]) -> tuple[int, Iterator[V]]:
        """How many of the tokens some key begins with, and the values of all keys that begin with so many."""
        node, done, _ = self._walk(tokens)[-1]
        return done, node.below()

    def beginnings(self, tokens: Sequence[int]) -> list[tuple[int, V]]:
        """The keys that the tokens begin with, as their lengths and values; the shortest first."""
        path = self._walk(tokens)
        return [(done, node.values[0]) for node, done, shared in path if node.values and shared == len(node.edge)]

    def _walk(self, key: Sequence[int]) -> list[tuple[_Node[V], int, int]]:
        """The nodes from the root along a key: each with the tokens so far, and how many of them are its edge's."""
        node, done = self._root, 0
        path = [(node, 0, 0)]
        while done < len(key) and (child := node.children.get(key[done])) is not None:
            shared = _shared(child.edge, key, done)
            done += shared
            path.append((child, done, shared))
            if shared < len(child.edge):
                break
            node = child
        return path

    def _split(self, node: _Node[V], at: int) -> _Node[V]:
        """Divides a node's edge. Returns the upper part: the node stays the lower one's parent's child."""
        lower = _Node(node.edge[at:], node.values, node.children)
        node.edge, node.values, node.children = node.edge[:at], _NONE, {lower.edge[0]: lower}
        return node


def _shared(edge: tuple[int, ...], key: Sequence[int], begin: int) -> int:
    """How many tokens an edge and a key from `begin` on share."""
    piece = tuple(key[begin : begin + len(edge)])
    low, high = 0, len(piece)
    if edge[:high] == piece:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if edge[low:middle] == piece[low:middle] else (low, middle)
    return low

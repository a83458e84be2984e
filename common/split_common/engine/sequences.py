"""Sequences, their KV memory, and runs of new tokens: the interfaces that packed and unpacked forwards share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, Self, TypeVar

import torch

from split_common.engine.trees import Kept


class KVSequence(Protocol):
    """What layers keep of one sequence: keys and values, and states."""

    @property
    def length(self) -> int:
        """How many tokens it holds."""

    def cost(self, tokens: int) -> int:
        """Memory that appending `tokens` tokens takes, in units of the store's `free`."""

    def truncate(self, tokens: int) -> None:
        """Cuts the sequence back to its first `tokens` tokens. Raises Evicted if that cannot be done."""

    def keep(self, begin: int, kept: Sequence[int]) -> None:
        """Drops all tokens from index `begin` on but those with these indices, counted from there, ascending.

        Raises:
            OutOfPages: there is too little memory for copies of shared pages; nothing was changed.
            UnsupportedFeature: tokens can only be dropped from its end.
        """

    def cost_after(self, begin: int, kept: Sequence[int], tokens: int) -> int:
        """Memory that keeping these tokens, and then appending `tokens` tokens, takes, in units of `free`."""

    def fork(self) -> KVSequence:
        """Returns a sequence with the same tokens, which grows independently."""

    def free(self) -> None:
        """Frees its memory."""


class KVStore(Protocol):
    """Makes sequences, and accounts for their memory."""

    def new_sequence(self) -> KVSequence:
        """Returns an empty sequence."""

    @property
    def free(self) -> int:
        """Free memory: in pages, or in tokens if there are no pages."""

    @property
    def free_tokens(self) -> int:
        """Tokens that fit into the free memory."""

    def held_by(self, sequences: Sequence[Any]) -> int:
        """Tokens of memory that these sequences of it hold. What several of them share counts once."""

    def freed_by(self, sequences: Sequence[Any]) -> int:
        """Tokens that would be free besides, without these sequences of it. What others share with them stays."""

    @property
    def capacity(self) -> int:
        """Tokens that fit into the whole memory."""

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes."""

    @property
    def sequence_tokens(self) -> int:
        """Tokens whose memory each sequence takes beside that of its own tokens; 0 if layers have no states."""


class Run(Protocol):
    """A part of a step, for one sequence or image. It goes into a forward whole, unless it is prefill."""

    @property
    def cost(self) -> int:
        """How much there is to compute: tokens, or the elements of an image's states."""

    def memory(self, count: int) -> int:
        """KV memory that the next `count` tokens take, in units of the store's `free`."""
        return 0

    def whole(self, begin: int, count: int) -> int:
        """The least number of tokens from `count` on, after which a prefill may be cut that goes on at `begin`."""
        return count

    def part(self, begin: int, count: int) -> Self:
        """The tokens `[begin, begin + count)` of a prefill."""
        raise TypeError("this run goes into a forward whole")


#: The position of a token, on one axis or on several.
Place = int | tuple[int, ...]

_Sequence = TypeVar("_Sequence", bound=KVSequence, covariant=True)


@dataclass(frozen=True)
class TokenRun(Run, Generic[_Sequence]):
    """Tokens to append to a sequence: hidden states `[tokens, width]`, on the host, and rotary positions."""

    sequence: _Sequence
    states: torch.Tensor
    positions: Sequence[int]
    #: The number of the sequence's adapter; None without one.
    adapter: int | None = None
    #: Positions on further axes; empty if all axes agree.
    axes: Sequence[Sequence[int]] = ()
    #: Begin and end, in the run, of tokens that attend to each other both ways; ascending.
    spans: Sequence[tuple[int, int]] = ()
    #: What is added to the output of some layers, `[tokens, width]`, by the layer's index.
    additions: Mapping[int, torch.Tensor] = field(default_factory=dict)
    #: The token of the run that each one follows, -1 for the last one before the run; empty if each follows the one
    #: before it. A run with parents is computed whole.
    parents: Sequence[int] = ()
    #: Which tokens of the sequence's last step stay, before the run is appended; None for all.
    kept: Kept | None = None

    @property
    def cost(self) -> int:
        return len(self.positions)

    def memory(self, count: int) -> int:
        if self.kept is not None and not self.kept.done:
            return self.sequence.cost_after(self.kept.begin, self.kept.indices, count)
        return self.sequence.cost(count)

    def settle(self) -> None:
        """Drops what does not stay of the sequence's last step. Raises what `KVSequence.keep` raises."""
        if self.kept is not None:
            self.kept.apply(self.sequence)

    @property
    def places(self) -> Sequence[Place]:
        """The position of each token: a number, or one on each axis."""
        return [*zip(self.positions, *self.axes, strict=True)] if self.axes else self.positions

    def whole(self, begin: int, count: int) -> int:
        return self.cost - begin if self.parents else after_spans(self.spans, begin + count) - begin

    def part(self, begin: int, count: int) -> TokenRun[_Sequence]:
        end = begin + count
        return replace(
            self,
            states=self.states[begin:end],
            positions=self.positions[begin:end],
            axes=[axis[begin:end] for axis in self.axes],
            spans=[(first - begin, last - begin) for first, last in self.spans if begin <= first and last <= end],
            additions={layer: features[begin:end] for layer, features in self.additions.items()},
        )


def after_spans(spans: Sequence[tuple[int, int]], cut: int) -> int:
    """The least index from `cut` on that is inside none of these spans, which do not overlap."""
    return max([cut, *(last for first, last in spans if first < cut < last)])


def positions_of(places: Sequence[Place]) -> torch.Tensor:
    """Positions, int64 `[1, tokens]`; `[axes, 1, tokens]` if those of some token have several axes."""
    axes = max((len(place) for place in places if isinstance(place, tuple)), default=0)
    if not axes:
        return torch.tensor([[*places]])
    every = [place if isinstance(place, tuple) else (place,) * axes for place in places]
    return torch.tensor(every).T[:, None].contiguous()

"""Where a model is cut: head `[0, first)`, body `[first, last)`, tail `[last, layers)`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from split_common.errors import ConfigError, InvalidSplit

#: Decoder layers that the device keeps at each end by default.
END_LAYERS = 2

#: Where denoisers are cut by default.
DEFAULT_CUT = "C"


@dataclass(frozen=True)
class Layers:
    """A body's range as a Python slice, for a model of any number of layers: `2:-2` leaves two at each end.

    Args:
        first: index of the first layer, from 0.
        last: index after the last layer; a negative one counts from the model's end, and None is the end.
    """

    first: int
    last: int | None

    @classmethod
    def parse(cls, text: str | Layers) -> Layers:
        """Reads `FIRST:LAST`, of which either may be missing. Raises ConfigError if the text is another one."""
        match = re.fullmatch(r"(\d{1,9})?:(-?\d{1,9})?", str(text), re.ASCII)
        if match is None:
            raise ConfigError(f"invalid --layers {str(text)!r}: expected FIRST:LAST, e.g. 2:-2")
        return cls(int(match[1] or 0), int(match[2]) if match[2] else None)

    def ends(self, count: Callable[[], int]) -> tuple[int, int]:
        """Numbers of layers before and after the body.

        Args:
            count: returns the number of the model's layers. Called only if the range ends at a layer that is
                counted from the model's start.

        Raises:
            InvalidSplit: the range is not a part of the model.
        """
        if self.last is None or self.last < 0:
            return self.first, -(self.last or 0)
        split = self.split(count())
        return split.first, split.layers - split.last

    def split(self, layers: int, unit: str = "layers") -> Split:
        """The range in a model of `layers` layers. Raises InvalidSplit if it is not a part of the model.

        Args:
            unit: what is counted, for the error.
        """
        last = layers if self.last is None else self.last
        last += layers if last < 0 else 0
        if not 0 <= self.first < last <= layers:
            raise InvalidSplit(
                f"--layers {self} is not a part of a model of {layers} {unit}: 2:-2 leaves two at each end"
            )
        return Split(layers, self.first, last)

    def __str__(self) -> str:
        return f"{self.first}:{'' if self.last is None else self.last}"


#: The default body of a language model.
DEFAULT_LAYERS = Layers(END_LAYERS, -END_LAYERS)


@dataclass(frozen=True)
class Split:
    """A cut of a stack of `layers` layers. Raises InvalidSplit if no layer is left for the body."""

    layers: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last <= self.layers:
            raise InvalidSplit(
                f"a model of {self.layers} layers has no body left with a head of {self.first} and a tail of "
                f"{self.layers - self.last} layers: both are at least 0, together at most {self.layers - 1}"
            )

    @classmethod
    def from_head_tail(cls, layers: int, head: int, tail: int) -> Split:
        """The split that leaves `head` and `tail` layers at the ends.

        Raises:
            InvalidSplit: either number is negative, or no layer is left for the body.
        """
        return cls(layers, head, layers - tail)

    @classmethod
    def parse(cls, layers: int, text: str, unit: str = "layers") -> Split:
        """Reads the body's range of a model of `layers` layers: see `Layers`. `unit` is what is counted.

        Raises:
            ConfigError: the text is not such a range.
            InvalidSplit: the range leaves no body.
        """
        return Layers.parse(text).split(layers, unit)

    @property
    def body(self) -> range:
        """Indices of the body's layers."""
        return range(self.first, self.last)

    def __str__(self) -> str:
        return f"{self.first}:{self.last}"


class Uncut(Split):
    """No cut: the device keeps all layers, as a head. There is no body."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers, layers, layers)

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise InvalidSplit("a model needs a layer")

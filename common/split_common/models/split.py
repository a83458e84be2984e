"""Where a model is cut: head `[0, first)`, body `[first, last)`, tail `[last, layers)`."""

from __future__ import annotations

from dataclasses import dataclass

from split_common.errors import ConfigError, InvalidSplit

#: Decoder layers that the device keeps at each end by default.
END_LAYERS = 2

#: Where denoisers are cut by default.
DEFAULT_CUT = "C"


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
    def parse(cls, layers: int, text: str) -> Split:
        """Reads `FIRST:LAST`, the body's range as a Python slice: `2:-2` leaves two layers at each end.

        Raises:
            ConfigError: the text is not such a range.
            InvalidSplit: the range leaves no body.
        """
        first, colon, last = text.partition(":")
        try:
            start, stop = int(first or 0), int(last) if last else layers
        except ValueError:
            colon = ""
        if not colon:
            raise ConfigError(f"invalid --layers {text!r}: expected FIRST:LAST, e.g. 2:-2")
        stop += layers if stop < 0 else 0
        if not 0 <= start < stop <= layers:
            raise InvalidSplit(
                f"--layers {text} is not a part of a model of {layers} layers: 2:-2 leaves two at each end"
            )
        return cls(layers, start, stop)

    @property
    def body(self) -> range:
        """Indices of the body's layers."""
        return range(self.first, self.last)

    def __str__(self) -> str:
        return f"{self.first}:{self.last}"

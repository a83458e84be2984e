"""What a device process of the stress command tells: one JSON object on a line for each event."""

from __future__ import annotations

import msgspec


class Asked(msgspec.Struct, tag="asked"):
    """A request begins."""

    number: int


class Decoded(msgspec.Struct, tag="decoded"):
    """So many tokens were decoded, or steps of images made, since the last event of this kind."""

    tokens: int


class Answered(msgspec.Struct, tag="answered"):
    """A request has ended with an output."""

    number: int
    #: Whether the output is the unsplit model's.
    equal: bool
    seconds: float
    #: Seconds from each token or step to the next.
    gaps: list[float]
    #: Seconds of each step during which the session went on at another worker.
    recoveries: list[float]
    #: Generated tokens of all returned sequences, and of the unsplit model's.
    tokens: int = 0
    wanted: int = 0
    #: Denoising steps of images.
    steps: int = 0


class Failed(msgspec.Struct, tag="failed"):
    """A request has ended with an error."""

    number: int
    error: str


class Traffic(msgspec.Struct, tag="traffic"):
    """The device's counters since its start."""

    bytes_sent: int
    bytes_received: int
    replays: int


Event = Asked | Decoded | Answered | Failed | Traffic

_decoder = msgspec.json.Decoder(Event)


def encode(event: Event) -> str:
    """The event's line."""
    return msgspec.json.encode(event).decode()


def decode(line: str) -> Event:
    """Reads a line. Raises msgspec.DecodeError."""
    event: Event = _decoder.decode(line)
    return event

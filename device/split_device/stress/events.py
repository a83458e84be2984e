"""The events that a device process of the stress command reports, one JSON object per line."""

from __future__ import annotations

import msgspec


class Asked(msgspec.Struct, tag="asked"):
    """A request has started."""

    number: int


class Decoded(msgspec.Struct, tag="decoded"):
    """Tokens decoded, or denoising steps made, since the last event of this kind."""

    tokens: int


class Answered(msgspec.Struct, tag="answered"):
    """A request ended with an output."""

    number: int
    #: Whether the output equals the unsplit model's.
    equal: bool
    seconds: float
    #: Time between consecutive tokens or steps, in seconds.
    gaps: list[float]
    #: Duration of each step during which the session moved to another worker, in seconds.
    recoveries: list[float]
    #: Number of generated tokens in all returned sequences, and in the unsplit model's.
    tokens: int = 0
    wanted: int = 0
    #: Number of denoising steps.
    steps: int = 0


class Failed(msgspec.Struct, tag="failed"):
    """A request ended with an error."""

    number: int
    error: str


class Traffic(msgspec.Struct, tag="traffic"):
    """The device's counters since it started."""

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

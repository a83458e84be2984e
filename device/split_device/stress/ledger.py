"""The requests of all devices, and their outcomes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from split_device.stress.events import Answered, Asked, Decoded, Event, Failed, Traffic


@dataclass
class Ledger:
    """Collects the events of all devices. `take` may be called from any thread."""

    #: Start of the run (`time.monotonic`); all other times are in seconds since then.
    began: float = field(default_factory=time.monotonic)
    #: Number of answers to each request, by device and request number.
    answers: dict[tuple[int, int], int] = field(default_factory=dict)
    mismatched: int = 0
    #: Number of outputs with more tokens than the unsplit model's.
    surplus: int = 0
    tokens: int = 0
    #: Number of denoising steps, and of answered image requests.
    steps: int = 0
    images: int = 0
    request_seconds: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    #: For each report of tokens or steps: its time, and their number.
    decoded: list[tuple[float, int]] = field(default_factory=list)
    #: The same for each device, by its index.
    decoded_by: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    #: Number of requests that ended with an error.
    failures: int = 0
    traffic: dict[int, Traffic] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, device: int, event: Event) -> None:
        """Records an event of a device."""
        with self._lock:
            match event:
                case Asked(number):
                    self.answers[device, number] = 0
                case Decoded(tokens):
                    report = time.monotonic() - self.began, tokens
                    self.decoded.append(report)
                    self.decoded_by.setdefault(device, []).append(report)
                case Answered():
                    self._answered(device, event)
                case Failed(_, error):
                    self.errors[error] += 1
                    self.failures += 1
                case Traffic():
                    self.traffic[device] = event

    def _answered(self, device: int, event: Answered) -> None:
        self.answers[device, event.number] += 1
        self.tokens += event.tokens
        self.steps += event.steps
        self.images += event.steps > 0
        self.surplus += event.tokens > event.wanted
        self.mismatched += not event.equal
        self.request_seconds.append(event.seconds)
        self.gaps += event.gaps
        self.recoveries += event.recoveries

    def rate(self, seconds: float = 5.0) -> float:
        """Tokens and steps per second over the last `seconds`."""
        now = time.monotonic() - self.began
        with self._lock:
            return sum(tokens for when, tokens in self.decoded[-1000:] if when > now - seconds) / seconds

    def decoded_between(self, began: float, ended: float, devices: Iterable[int]) -> int:
        """Tokens and steps that some devices reported in a time, in seconds since the run began."""
        with self._lock:
            reports = [report for device in devices for report in self.decoded_by.get(device, [])]
        return sum(tokens for when, tokens in reports if began <= when < ended)

    @property
    def devices_answered(self) -> int:
        """Number of devices that have got an answer."""
        with self._lock:
            return len({device for (device, _), answers in self.answers.items() if answers})

    @property
    def requests(self) -> int:
        return len(self.answers)

    @property
    def completed(self) -> int:
        with self._lock:
            return sum(answers > 0 for answers in self.answers.values())

    @property
    def lost(self) -> int:
        return self.requests - self.completed

    @property
    def duplicated(self) -> int:
        with self._lock:
            return self.surplus + sum(max(0, answers - 1) for answers in self.answers.values())

    @property
    def replays(self) -> int:
        return sum(traffic.replays for traffic in list(self.traffic.values()))

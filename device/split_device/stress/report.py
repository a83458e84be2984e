"""The report of the stress command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from split_device.stress.chaos import Chaos
from split_device.stress.hostile.outcome import HostileOutcome
from split_device.stress.ledger import Ledger
from split_device.stress.memory import Resident

#: Percentiles that are reported.
PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True)
class Report:
    """The result of a run. Field names are the keys of `--json`; fields ending in `_ms` are in milliseconds."""

    transport: str
    seed: int
    seconds: float
    requests: int
    completed: int
    tokens: int
    #: Number of completed requests for images, and of their denoising steps.
    images: int
    steps: int
    #: Requests without an output: they ended with an error or with their process, or did not end.
    lost: int
    #: Outputs beyond the first to one request, and outputs with more tokens than the unsplit model's.
    duplicated: int
    #: Outputs that differ from the unsplit model's.
    mismatched: int
    worker_kills: int
    worker_stops: int
    broker_restarts: int
    replays: int
    tokens_per_second: float
    steps_per_second: float
    request_ms: dict[str, float | None]
    inter_token_ms: dict[str, float | None]
    #: Duration of the steps during which a session was replayed.
    recovery_ms: dict[str, float | None]
    bytes_sent: int
    bytes_received: int
    faults: dict[str, int]
    errors: dict[str, int]
    memory: list[dict[str, object]]
    memory_within: bool
    #: Number of entries that Redis still holds at the end; None for ZeroMQ, or a queue that runs already.
    left: dict[str, int] | None
    interrupted: bool
    #: What a hostile member cost the honest ones (`HostileOutcome.facts`); None without one.
    hostile: dict[str, Any] | None = None
    #: Whether the fleet withstood the hostile member, if there was one.
    withstood: bool = True

    @property
    def sound(self) -> bool:
        """Whether every request was answered exactly once, and correctly."""
        return not (self.lost or self.duplicated or self.mismatched)

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def report(
    transport: str,
    seed: int,
    seconds: float,
    ledger: Ledger,
    chaos: Chaos | None,
    memory: Sequence[Resident],
    left: dict[str, int] | None,
    interrupted: bool,
    hostile: HostileOutcome | None = None,
) -> Report:
    """Sums up a run of `seconds`."""
    counts = chaos.counts if chaos is not None else {}
    traffic = ledger.traffic.values()
    return Report(
        transport=transport,
        seed=seed,
        seconds=round(seconds, 1),
        requests=ledger.requests,
        completed=ledger.completed,
        tokens=ledger.tokens,
        images=ledger.images,
        steps=ledger.steps,
        lost=ledger.lost,
        duplicated=ledger.duplicated,
        mismatched=ledger.mismatched,
        worker_kills=counts.get("kill", 0),
        worker_stops=counts.get("stop", 0),
        broker_restarts=counts.get("broker", 0),
        replays=ledger.replays,
        tokens_per_second=round(ledger.tokens / seconds, 1),
        steps_per_second=round(ledger.steps / seconds, 1),
        request_ms=percentiles(ledger.request_seconds),
        inter_token_ms=percentiles(ledger.gaps),
        recovery_ms=percentiles(ledger.recoveries),
        bytes_sent=sum(each.bytes_sent for each in traffic),
        bytes_received=sum(each.bytes_received for each in traffic),
        faults=dict(counts),
        errors=dict(ledger.errors),
        memory=[resident.facts() for resident in memory],
        memory_within=all(resident.within for resident in memory),
        left=left,
        interrupted=interrupted,
        hostile=hostile.facts() if hostile is not None else None,
        withstood=hostile is None or hostile.withstood,
    )


def percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """Percentiles in milliseconds by nearest rank; None if there are no values."""
    ordered = sorted(seconds)
    return {
        f"p{percent}" if percent < 100 else "max": (
            round(1000 * ordered[-(-percent * len(ordered) // 100) - 1], 1) if ordered else None
        )
        for percent in PERCENTILES
    }


def table(report: Report) -> Table:
    """The report for people."""
    shown = Table("what", title="stress", title_justify="left")
    shown.add_column("value", justify="right")
    facts = report.facts()
    for key in (*_COUNTS, "tokens_per_second", "steps_per_second", "bytes_sent", "bytes_received"):
        value = facts[key]
        shown.add_row(key.replace("_", " "), f"{value:,}")
    for key in ("request_ms", "inter_token_ms", "recovery_ms"):
        times = (f"{name} {value:,.0f}" for name, value in facts[key].items() if value is not None)
        shown.add_row(key.replace("_", " "), ", ".join(times) or "none")
    shown.add_row("faults", ", ".join(f"{count} {kind}" for kind, count in report.faults.items()) or "none")
    for error, count in report.errors.items():
        shown.add_row("error", f"{count} × {error}")
    for each in report.memory:
        grown = "" if each["within"] else "  (!)"
        # A process that was restarted a moment ago has no baseline yet.
        before = "" if each["mib_10s"] is None else f"{each['mib_10s']} → "
        shown.add_row(f"memory of {each['process']}", f"{before}{each['mib']} MiB{grown}")
    if report.left is not None:
        shown.add_row("left in Redis", ", ".join(f"{count} {what}" for what, count in report.left.items()))
    if report.hostile is not None:
        _add_hostile(shown, report.hostile)
    return shown


def _add_hostile(shown: Table, hostile: dict[str, Any]) -> None:
    """Adds a row for each mode: throughput beside the hostile member and its bystander, and what went wrong."""
    for name, mode in hostile["modes"].items():
        row = f"{mode['honest_beside_hostile']:,.0f} of {mode['honest_beside_bystander']:,.0f} tokens or steps/s"
        row += f" = {mode['share']:.2f}, {mode['cpu_seconds']:.1f} s CPU"
        if not mode["alike"]:
            row += f", of which the bystander got only {mode['bystander_burned']:.0%}: the share is too low (!)"
        for what in ("lost", "crashed"):
            row += f", {mode[what]} {what} (!)" if mode[what] else ""
        for what in ("failure", "memory_exceeded"):
            row += f", {what.replace('_', ' ')}: {mode[what]} (!)" if mode[what] else ""
        shown.add_row(f"hostile {name}", row)
    shown.add_row("honest throughput share", f"{hostile['honest_throughput_share']:.2f}")
    shown.add_row("memory bounded", "yes" if hostile["memory_bounded"] else "no (!)")


_COUNTS = (
    "requests",
    "completed",
    "tokens",
    "images",
    "steps",
    "lost",
    "duplicated",
    "mismatched",
    "worker_kills",
    "worker_stops",
    "broker_restarts",
    "replays",
)

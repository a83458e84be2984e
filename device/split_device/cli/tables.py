"""Tables that commands print."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def parts_table(name: str, rows: list[Any]) -> Table:
    """A table of a model's parts."""
    table = Table("part", "where", "layers", title=name)
    for column in ("parameters", "MiB", "share"):
        table.add_column(column, justify="right")
    for row in rows:
        where = "worker" if row.name == "body" else "device"
        size = f"{row.bytes / 2**20:,.1f}"
        table.add_row(row.name, where, row.layers, f"{row.parameters:,}", size, f"{row.share:.1%}")
    return table


def timings_table(prompt_ms: dict[str, float], step_ms: dict[str, float]) -> Table:
    """A table of milliseconds by stage: for the prompt, and the mean of later steps, of one token or more."""
    table = Table("stage", title="milliseconds")
    table.add_column("prompt", justify="right")
    table.add_column("each step", justify="right")
    for stage, milliseconds in step_ms.items():
        table.add_row(stage, f"{prompt_ms.get(stage, 0.0):.2f}", f"{milliseconds:.2f}")
    table.add_row("all", f"{sum(prompt_ms.values()):.2f}", f"{sum(step_ms.values()):.2f}")
    return table

"""A plot of throughput over time, with the faults marked."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

from split_common.errors import ConfigError
from split_common.system.outputs import check_output, write_output
from split_device.stress.chaos import INTERVALS, Chaos
from split_device.stress.ledger import Ledger

#: Time that one point of the curve covers, in seconds.
BIN = 1.0


def check_plot(path: Path) -> None:
    """Raises ConfigError if `draw` cannot write to this path."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'lambda-split[plot]'")
    check_output(path)
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ConfigError(f"invalid plot file {path}: expected a name ending in .{', .'.join(sorted(formats))}")


def draw(path: Path, ledger: Ledger, chaos: Chaos | None, seconds: float) -> None:
    """Writes the plot in the format of the file's extension. Raises ConfigError if it cannot be written."""
    from matplotlib.figure import Figure

    bins = [0.0] * (int(seconds / BIN) + 1)
    for when, tokens in ledger.decoded:
        if 0 <= when < seconds:
            bins[int(when / BIN)] += tokens / BIN
    figure = Figure(figsize=(12, 5), layout="constrained")
    curve, marks = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    curve.plot([(index + 0.5) * BIN for index in range(len(bins))], bins, color="tab:blue", linewidth=1.2)
    curve.set_ylabel("tokens/s")
    curve.set_ylim(bottom=0)
    curve.grid(alpha=0.3)
    curve.set_title(
        f"{ledger.completed} of {ledger.requests} requests answered, {ledger.replays} sessions replayed"
    )
    history = chaos.history if chaos is not None else []
    for row, kind in enumerate(INTERVALS):
        times = [when - ledger.began for when, of in history if of == kind]
        marks.scatter(times, [row] * len(times), marker="|", s=80, color=f"C{row + 1}")
        if kind in ("kill", "broker"):
            for when in times:
                curve.axvline(when, color=f"C{row + 1}", alpha=0.4, linewidth=0.8)
    marks.set_yticks(range(len(INTERVALS)), list(INTERVALS))
    marks.set_ylim(len(INTERVALS) - 0.5, -0.5)
    marks.set_xlabel("seconds")
    marks.set_xlim(0, seconds)
    marks.grid(alpha=0.3, axis="x")
    content = io.BytesIO()
    try:
        figure.savefig(content, dpi=120, format=path.suffix[1:].lower())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot draw {path}: {error}") from None
    write_output(path, content.getvalue())

"""Where the tokens of images are in a step: positions on several axes, and spans that attend both ways."""

from __future__ import annotations

from collections import defaultdict

from split_common.engine.runner import Runner
from split_common.errors import Malformed, PromptTooLong
from split_common.protocol import payloads

#: The positions of a run on further axes, and begin and end of its spans in the run, ascending.
Placement = tuple[list[list[int]], list[tuple[int, int]]]


def placements(step: payloads.Step, axes: int) -> list[Placement]:
    """Where the tokens of each run are. The step has passed `check_placement`; a plain `Step` has neither."""
    if not isinstance(step, payloads.PlacedStep):
        return [([], []) for _ in step.rows]
    spans: defaultdict[int, list[payloads.Span]] = defaultdict(list)
    for span in step.spans:
        spans[span.row].append(span)
    placed = []
    for run, further in zip(step.rows, step.axes or [[]] * len(step.rows), strict=True):
        tokens = len(run.positions)
        own = sorted((span.start - run.start, span.start - run.start + span.length) for span in spans[run.row])
        placed.append(([further[axis * tokens : (axis + 1) * tokens] for axis in range(axes - 1) if further], own))
    return placed


def check_placement(step: payloads.PlacedStep, runner: Runner) -> None:
    """Checks what a step says of images against its runs and the model.

    Raises:
        Malformed: it does not fit the step's runs, or the layers.
        PromptTooLong: a position exceeds the model's.
    """
    axes = runner.layers.stack.position_axes
    if step.axes and len(step.axes) != len(step.rows):
        raise Malformed(f"a step of {len(step.rows)} runs with further axes for {len(step.axes)}")
    for run, further in zip(step.rows, step.axes, strict=False):
        if further and len(further) != (axes - 1) * len(run.positions):
            raise Malformed(
                f"{len(further)} positions on further axes, for {len(run.positions)} tokens and {axes} axes"
            )
        if max(further, default=0) >= runner.max_positions:
            raise PromptTooLong(f"a row exceeds the model's {runner.max_positions} positions")
    if step.spans and runner.unpacked_because is not None:
        raise Malformed(f"images that attend both ways need packed layers: {runner.unpacked_because}")
    runs = {run.row: run for run in step.rows}
    ends: dict[int, int] = {}
    for span in sorted(step.spans, key=lambda span: (span.row, span.start)):
        spanned = runs.get(span.row)
        if (
            spanned is None
            or span.start < max(spanned.start, ends.get(span.row, 0))
            or span.start + span.length > spanned.start + len(spanned.positions)
        ):
            raise Malformed(
                "a span of tokens that attend both ways is not part of one run, or overlaps another one"
            )
        ends[span.row] = span.start + span.length

"""Trees in a step: which token each one follows, and which of an earlier tree's tokens stay."""

from __future__ import annotations

from collections.abc import Sequence

from split_common.engine.runner import Runner
from split_common.engine.trees import Kept, is_path, is_tree
from split_common.errors import Malformed
from split_common.protocol import payloads


def branches(step: payloads.Step, index: int) -> tuple[Sequence[int], Kept | None]:
    """The parents of a run's tokens, empty for a chain, and which tokens before it stay, None for all.

    The step has passed `check_branches`, if it is one that can say so.
    """
    if not isinstance(step, payloads.TreeStep):
        return (), None
    kept = step.kept[index] if step.kept else []
    before = Kept(step.rows[index].start - len(kept), kept) if kept else None
    return step.parents[index] if step.parents else (), before


def check_branches(step: payloads.TreeStep, lengths: Sequence[int], runner: Runner) -> None:
    """Checks what a step says of trees against its runs and the model.

    Args:
        step: the step.
        lengths: of the row of each run.
        runner: of the layers.

    Raises:
        Malformed: it does not fit the step's runs, their rows or the layers.
    """
    if not runner.takes_trees:
        raise Malformed("a tree for layers that take none")
    if any(each and len(each) != len(step.rows) for each in (step.parents, step.kept)):
        raise Malformed("a step with trees says for some of its runs what their tokens follow, and not for all")
    for run, parents in zip(step.rows, step.parents, strict=False):
        if parents and (len(parents) != len(run.positions) or not is_tree(parents)):
            raise Malformed("each token of a tree follows one before it, and all have to be named")
        if parents and any(span.row == run.row for span in step.spans):
            raise Malformed("tokens of a tree do not attend both ways")
    for run, kept, length in zip(step.rows, step.kept, lengths, strict=False):
        if kept and not (is_path(kept) and (begin := run.start - len(kept)) >= 0 and begin + kept[-1] < length):
            raise Malformed("the tokens that stay of a tree have to be tokens of the row, in order")

"""The drafters that there are, by name."""

from __future__ import annotations

from collections.abc import Callable

from split_common.errors import ConfigError
from split_device.speculation.combined import CombinedPredictor
from split_device.speculation.drafter import Drafter, TreeDrafter
from split_device.speculation.names import AUTO, MTP, OFF, check_speculate
from split_device.speculation.ngram import NgramDrafter
from split_device.speculation.recycle import RecyclePredictor, Successors
from split_device.speculation.suffix import SuffixPredictor
from split_device.speculation.tree import PredictedDrafter

#: Makes a drafter for one request, from what the requests of its generator have learned together, by the drafter's
#: name, which is in `names.Speculate`, too.
DRAFTERS: dict[str, Callable[[Successors], Drafter]] = {
    "ngram": lambda _: NgramDrafter(),
    "suffix": lambda _: PredictedDrafter(SuffixPredictor()),
    "recycle": lambda successors: PredictedDrafter(RecyclePredictor(successors)),
    "suffix-recycle": lambda successors: PredictedDrafter(
        CombinedPredictor(SuffixPredictor(), RecyclePredictor(successors))
    ),
}

#: Those that draft several continuations, where the layers and the worker take them.
TREES = ("recycle", "suffix-recycle")

#: Most tokens of a decoding step with several continuations: one, and 32 drafted.
TREE_TOKENS = 33

#: The drafter of `AUTO`.
DRAFTER_OF_AUTO = "ngram"


def make_drafter(name: str, successors: Successors) -> Drafter:
    """A drafter for one request.

    Args:
        name: one of `DRAFTERS`, or `auto`.
        successors: what the requests of its generator learn together.

    Raises:
        ConfigError: there is none of this name.
    """
    name = DRAFTER_OF_AUTO if name == AUTO else name
    if name not in DRAFTERS:
        raise ConfigError(f"invalid speculate {name!r}: expected one of {', '.join(DRAFTERS)}")
    return DRAFTERS[name](successors)


def has_branches(drafter: str | Drafter) -> bool:
    """Whether a drafter, or the one of this name, drafts several continuations."""
    return drafter in TREES if isinstance(drafter, str) else isinstance(drafter, TreeDrafter)


def check_choice(name: str) -> str:
    """What a request asks for, if it is `auto`, `off`, a drafter that there is, MTP layers, or a draft model.

    Raises:
        ConfigError: it is something else.
    """
    return check_speculate(name, [AUTO, OFF, *DRAFTERS, MTP])

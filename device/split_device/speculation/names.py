"""What may be asked for, by the names that vLLM has, without importing torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

from split_common.errors import ConfigError

#: No drafts; and drafts only of as many tokens as pay.
OFF = "off"
AUTO = "auto"

#: What comes before the directory or hub id of a draft model.
DRAFT = "draft:"

#: Layers of the checkpoint's own that predict tokens after the next one (multi-token prediction).
MTP = "mtp"

#: What vLLM's users write before a model that reads keys and values of the large one, of which there is none here.
ASSISTANT = "assistant:"

#: All that may be asked for beside draft models: these two, and the names of the drafters.
Speculate = Literal["auto", "off", "ngram", "suffix", "recycle", "suffix-recycle", "mtp"]
SPECULATE: tuple[str, ...] = get_args(Speculate)
SPECULATE_METAVAR = "|".join([*SPECULATE, f"{DRAFT}MODEL"])


def draft_model(asked: object) -> str | None:
    """The directory or hub id of the draft model that is asked for, if a name is; None if another drafter is."""
    return asked.removeprefix(DRAFT) or None if isinstance(asked, str) and asked.startswith(DRAFT) else None


def is_loaded(asked: object) -> bool:
    """Whether what is asked for has weights, which are loaded with the generator: a draft model, or MTP layers."""
    return asked == MTP or draft_model(asked) is not None


def check_speculate(name: str, names: Collection[str] = SPECULATE) -> str:
    """The name. Raises ConfigError if it is not among `names`, and does not name a draft model either."""
    if name.startswith(ASSISTANT):
        raise ConfigError(
            f"speculate {name!r} cannot be done: an assistant attends to the keys and values that the model's own "
            "layers keep, and here cannot read those of a split model; model.generate(assistant_model=) can, and "
            f"{MTP} and {DRAFT}MODEL need none"
        )
    if name not in names and draft_model(name) is None:
        raise ConfigError(f"invalid speculate {name!r}: expected one of {', '.join(names)}, {DRAFT}MODEL")
    return name

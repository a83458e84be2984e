"""Layers that use what an earlier layer has computed: its keys and values, or its choice of keys.

That does not travel, so both layers have to be on the same side of a cut. Where they are is said by the fields that
configurations of transformers have for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from split_common.errors import InvalidSplit
from split_common.models.split import Split


@dataclass(frozen=True)
class Link:
    """Layer `user` uses what layer `source` has computed; `what` names it."""

    user: int
    source: int
    what: str


def find_links(config: Any) -> list[Link]:
    """The links of a text configuration's layers."""
    return [*_shared_choices(config), *_shared_keys(config)]


def check_links(config: Any, split: Split, name: str) -> None:
    """Raises InvalidSplit if a link would cross the cut; the message has a cut that would do.

    Args:
        config: the text configuration.
        split: the cut.
        name: the model's.
    """
    links = find_links(config)
    crossing = next((link for link in links if _crosses(link, split)), None)
    if crossing is None:
        return
    cut = nearest_cut(links, split)
    raise InvalidSplit(
        f"{name}: layer {crossing.user} uses {crossing.what} of layer {crossing.source}, which is not on its side: "
        f"use --layers {cut} (head_layers={cut.first}, tail_layers={cut.layers - cut.last})"
    )


def nearest_cut(links: list[Link], split: Split) -> Split:
    """The cut most like `split` that no link crosses: with a body within that of `split`, if there is one."""
    cuts = (
        Split(split.layers, first, last)
        for first in range(split.layers)
        for last in range(first + 1, split.layers + 1)
    )
    return min(
        (cut for cut in cuts if not any(_crosses(link, cut) for link in links)),
        key=lambda cut: (
            cut.first < split.first or cut.last > split.last,
            abs(cut.first - split.first) + abs(cut.last - split.last),
        ),
    )


def _crosses(link: Link, split: Split) -> bool:
    return _part(link.user, split) != _part(link.source, split)


def _part(layer: int, split: Split) -> int:
    """0 for a layer of the head, 1 of the body, 2 of the tail."""
    return (layer >= split.first) + (layer >= split.last)


def _shared_choices(config: Any) -> list[Link]:
    """Layers that attend to the keys that the last indexer before them has chosen."""
    links, source = [], 0
    for layer, kind in enumerate(getattr(config, "indexer_types", None) or ()):
        if kind == "shared":
            links.append(Link(layer, source, "the choice of keys"))
        else:
            source = layer
    return links


def _shared_keys(config: Any) -> list[Link]:
    """Layers that attend to another layer's keys: a given one, or the last of their kind that keeps its own."""
    modes = getattr(config, "kv_sharing_modes", None) or ()
    sources = getattr(config, "kv_source_layers", None)
    links = []
    last: dict[str, int] = {}
    for layer, mode in enumerate(modes):
        kind = str(config.layer_types[layer])
        if mode in (None, "store"):
            last[kind] = layer
        else:
            source = sources[layer] if sources is not None else last.get(kind, layer)
            links.append(Link(layer, int(source), "keys and values"))
    return links

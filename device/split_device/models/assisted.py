"""Assisted decoding in `generate`, transformers' own: what of it runs split, and how long its steps may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from split_common.compat.transformers import forward_parameters, is_stateful
from split_common.engine.scheduler import DECODE_TOKENS
from split_common.errors import UnsupportedFeature

#: Options of `generate` that ask for it.
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "use_mtp")


def check_assisted(model: Any, options: Mapping[str, Any]) -> int:
    """Checks how a call of `generate` drafts.

    Args:
        model: the split model.
        options: all that are set, the call's and the defaults.

    Returns:
        The tokens for which its decoding steps have room.

    Raises:
        UnsupportedFeature: it cannot draft in this way.
    """
    if "assistant_early_exit" in options:
        raise UnsupportedFeature(
            "assistant_early_exit does not run split, because layers that would draft are on the worker: use "
            "prompt_lookup_num_tokens or assistant_model"
        )
    if "speculate" in options:
        raise UnsupportedFeature(
            "speculate is an argument of Request and Generator: generate takes prompt_lookup_num_tokens, "
            "assistant_model or use_mtp"
        )
    if is_stateful(model) and any(options.get(name) for name in ASSISTED):
        raise UnsupportedFeature(
            "assisted decoding takes tokens back, which the device's layers with states cannot do: use it "
            "with head_layers and tail_layers that leave all such layers to the worker, e.g. 0"
        )
    if options.get("use_mtp"):
        _check_mtp(model)
    if (assistant := options.get("assistant_model")) is not None:
        _check_assistant(model, assistant)
    return _room(options)


def _check_mtp(model: Any) -> None:
    """Raises UnsupportedFeature if transformers does not find the MTP layers of a split model."""
    if model.split.last == model.split.layers:
        raise UnsupportedFeature(
            "use_mtp needs the model's last layer on the device: use tail_layers of at least 1, or "
            'Generator(model, speculate="mtp")'
        )
    if model.revision is not None:
        raise UnsupportedFeature(
            f"use_mtp reads the MTP layers of the hub's default branch, not of revision {model.revision!r}: use "
            'Generator(model, speculate="mtp")'
        )


def _check_assistant(model: Any, assistant: Any) -> None:
    """Raises UnsupportedFeature if an assistant reads keys and values of a layer that is on the worker."""
    if "shared_kv_states" not in forward_parameters(type(assistant)):
        return
    config = model.config.get_text_config(decoder=True)
    kinds = list(getattr(config, "layer_types", None) or [])
    # Layers that hand on what others use, or else the last one of each kind.
    read = [index for index, mode in enumerate(getattr(config, "kv_sharing_modes", None) or []) if mode == "store"]
    read = read or [index for index, kind in enumerate(kinds) if kind not in kinds[index + 1 :]]
    if away := [index for index in read if index in model.split.body]:
        raise UnsupportedFeature(
            f"{type(assistant).__name__} attends to keys and values of layer {away[0]}, which is on the worker: "
            f"use tail_layers of at least {model.split.layers - away[0]}"
        )


def _room(options: Mapping[str, Any]) -> int:
    assistant, lookup = options.get("assistant_model"), options.get("prompt_lookup_num_tokens")
    if not any(options.get(name) for name in ASSISTED):
        return 1
    config = getattr(assistant, "generation_config", None)
    drafted = lookup if assistant is None else getattr(config, "num_assistant_tokens", None)
    return max(DECODE_TOKENS, 1 + int(drafted or 0))

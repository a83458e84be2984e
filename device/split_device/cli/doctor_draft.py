"""`lambda-split doctor --model --speculate`: whether a small model, or MTP layers, can draft for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from split_common.errors import ConfigError, SplitError, UnsupportedFeature
from split_device.cli.finding import Finding
from split_device.speculation.names import DRAFT, MTP, draft_model, is_loaded

#: Memory for keys and values while the draft model is tried, in bytes.
TRIAL_BYTES = 64 * 1024**2


def asked_draft_model(speculate: str | None, model: str | None) -> str | None:
    """What `--speculate` asks for, a draft model or MTP layers; None without the option.

    Raises:
        ConfigError: another drafter is asked for, or there is no model to draft for.
    """
    if speculate is None:
        return None
    if not is_loaded(speculate):
        raise ConfigError(f"--speculate {speculate} needs no check: doctor checks {DRAFT}MODEL and {MTP}")
    if model is None:
        raise ConfigError("a draft model is checked with the model that it drafts for: give --model as well")
    return speculate


def draft_findings(asked: str, model: str) -> Iterator[Finding]:
    """What loading what drafts for a model, and running its layers, shows.

    Args:
        asked: as `asked_draft_model` returns it.
    """
    import torch

    from split_common.models.loading import read_spec
    from split_device.generation.draft_layers import DraftLayers, check_tokens
    from split_device.generation.mtp_layer import load_mtp
    from split_device.models.traits import keeps_states

    name = draft_model(asked)
    subject = "MTP layers" if name is None else "draft model"
    try:
        if keeps_states(read_spec(model).text_config):
            raise UnsupportedFeature(f"{model} takes no drafts: its layers keep states")
        if name is None:
            load_mtp(model, None, None, torch.device("cpu"))
        else:
            check_tokens(name, model)
            DraftLayers(name, None, torch.device("cpu"), TRIAL_BYTES)
    except SplitError as error:
        yield Finding(subject, "problem", str(error))
    else:
        can = "it has MTP layers" if name is None else f"{name} has the model's tokens"
        yield Finding(subject, "ok", f"{can}, and drafts for many requests at once")

"""`lambda-split doctor --model --speculate draft:MODEL`: whether a small model can draft for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from split_common.errors import ConfigError, SplitError, UnsupportedFeature
from split_device.cli.finding import Finding
from split_device.speculation.names import DRAFT, draft_model

#: Memory for keys and values while the draft model is tried, in bytes.
TRIAL_BYTES = 64 * 1024**2


def asked_draft_model(speculate: str | None, model: str | None) -> str | None:
    """The draft model of `--speculate`; None without the option.

    Raises:
        ConfigError: another drafter is asked for, or there is no model to draft for.
    """
    if speculate is None:
        return None
    if (name := draft_model(speculate)) is None:
        raise ConfigError(f"--speculate {speculate} needs no check: doctor checks {DRAFT}MODEL")
    if model is None:
        raise ConfigError("a draft model is checked with the model that it drafts for: give --model as well")
    return name


def draft_findings(name: str, model: str) -> Iterator[Finding]:
    """What loading a draft model for another model, and running its layers, shows."""
    import torch

    from split_common.models.loading import read_spec
    from split_device.generation.draft_layers import DraftLayers, check_tokens
    from split_device.models.traits import keeps_states

    try:
        if keeps_states(read_spec(model).text_config):
            raise UnsupportedFeature(f"{model} takes no drafts: its layers keep states")
        check_tokens(name, model)
        DraftLayers(name, None, torch.device("cpu"), TRIAL_BYTES)
    except SplitError as error:
        yield Finding("draft model", "problem", str(error))
    else:
        yield Finding("draft model", "ok", f"{name} has the model's tokens, and drafts for many requests at once")

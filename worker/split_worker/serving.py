"""What a worker serves: the body that a checkpoint's kind calls for, loaded and checked against the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from split_common import headers
from split_common.checkpoint import Checkpoint
from split_common.diffusion.kinds import is_denoiser, plan_image
from split_common.errors import ConfigError
from split_common.fleet import Fleet
from split_common.manifest import find_manifest
from split_common.part import plan
from split_common.split import Split
from split_worker.body import Body
from split_worker.diffusion import DiffusionBody

#: The body of a language model, and the cut of an image model, unless told otherwise.
LAYERS = "2:-2"
CUT = "C"


@dataclass(frozen=True)
class Serving:
    """A loaded body, and under what it is served: the model's name is for people."""

    body: Body | DiffusionBody
    service: headers.Service
    model: str


def load_body(
    model: str,
    fleet: Fleet,
    *,
    revision: str | None = None,
    layers: str | None = None,
    cut: str | None = None,
    ip_adapter: str | Path | None = None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
) -> Serving:
    """Loads the body of a language model or of a diffusion model's denoiser.

    Args:
        model: a directory or hub id.
        fleet: whose manifest the tensors must match.
        layers: the body's layers (of a denoiser its blocks) as `FIRST:LAST`.
        cut: of a denoiser, by name.
        ip_adapter: the safetensors file of an IP-Adapter of a UNet.
        memory: bytes for keys and values, or for embeddings; None for the default.

    Raises:
        ConfigError, InvalidSplit: the model cannot be cut so.
        ModelError, KeysError: it cannot be loaded, or is not in the fleet.
    """
    checkpoint = Checkpoint.resolve(model, revision, ip_adapter)
    if not is_denoiser(checkpoint):
        for option, given in (("--cut", cut), ("--ip-adapter", ip_adapter)):
            if given is not None:
                raise ConfigError(f"{option} is for diffusion models, and {model} is none")
        text = plan(checkpoint)
        split = Split.parse(text.layers, layers or LAYERS)
        manifest = find_manifest(fleet, text.checkpoint, text.own_tensors(split, "worker"))
        body: Body | DiffusionBody = Body(text, split, device, dtype, memory)
    else:
        if cut is not None and layers is not None:
            raise ConfigError("--layers and --cut say the same thing: give one of them")
        image = plan_image(checkpoint)
        split = image.split(cut or CUT) if layers is None else image.check(Split.parse(image.blocks, layers))
        manifest = find_manifest(fleet, checkpoint, image.own_tensors(split, "worker"))
        body = DiffusionBody(image, split, device, dtype, memory)
    return Serving(body, headers.Service(manifest.root, split.first, split.last), manifest.name)

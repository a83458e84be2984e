"""Checkpoints with MTP layers, tiny and random, whose tensors have the names that released ones have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tiny

#: What follows the number of a layer behind the last one, and in the manner of Qwen3-Next and Mellum.
_BEHIND = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "post_norm": "shared_head.norm"}
_APART = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "post_norm": "norm"}

#: Changes tensors, by their names.
Change = Callable[[dict[str, torch.Tensor]], None]


def save(arch: str, directory: Path, change: Change = lambda _: None, **changes: object) -> Path:
    """Saves a model of `tiny` with one more layer, which becomes an MTP layer.

    Args:
        arch: `mellum` gets its tensors apart from the layers, others behind the last one.
        change: is called with all tensors; those of the MTP layer are `mtp.NAME`, and `mtp.block.NAME`.
    """
    layers = tiny.LAYERS
    tiny.save(arch, directory, num_hidden_layers=layers + 1, **changes)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    width = tensors["model.norm.weight"].shape[0]
    generator = torch.Generator().manual_seed(4)
    own = {re.sub(rf"^model\.layers\.{layers}\.", "mtp.block.", name): tensor for name, tensor in tensors.items()}
    for role in ("enorm", "hnorm", "post_norm"):
        own[f"mtp.{role}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
    own["mtp.eh_proj.weight"] = 0.25 * torch.randn(width, 2 * width, generator=generator)
    change(own)
    apart = arch == "mellum"
    block = "mtp.layers.0." if apart else f"model.layers.{layers}."
    root, names = ("mtp.", _APART) if apart else (block, _BEHIND)
    renamed = {}
    for name, tensor in own.items():
        if name.startswith("mtp.block."):
            name = block + name.removeprefix("mtp.block.")
        elif name.startswith("mtp."):
            name = f"{root}{names[name.split('.')[1]]}.weight"
        renamed[name] = tensor.contiguous()
    save_file(renamed, file, {"format": "pt"})
    config = json.loads((directory / "config.json").read_bytes())
    config["num_hidden_layers"] = layers
    for field in ("layer_types", "mlp_layer_types"):
        if field in config:
            config[field] = config[field][:layers]
    config["num_nextn_predict_layers"] = 1
    config.pop("num_mtp_layers", None)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def predicts(tensors: dict[str, torch.Tensor]) -> None:
    """Makes the next token depend on the last one alone, and the MTP layer right about it: a `Change`.

    No layer adds anything. The projection keeps the embedding.
    """
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
        if re.fullmatch(r"mtp\.\w*norm\.weight|model\.norm\.weight", name):
            tensor.fill_(1)
    # Sure of it, too: drafts end where that is not likely.
    tensors["lm_head.weight"].mul_(20)
    projection = tensors["mtp.eh_proj.weight"]
    projection.zero_()
    projection[:, : len(projection)] = torch.eye(len(projection))

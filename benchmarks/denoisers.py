"""Shares of the device and bytes on the wire for each cut of well-known denoisers: real shapes, without weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

#: How each codec encodes hidden states in half precision.
CODECS = {"none": "float16", "fp16": "float16", "int8": "int8", "int4": "int4"}

#: Configurations of the original denoisers; other fields are the defaults of diffusers' class. `rows` is the batch
#: size of a step: with guidance, each image has two rows.
SHAPES: dict[str, dict[str, Any]] = {
    "sdxl": {
        "class": "UNet2DConditionModel",
        "size": 1024,
        "tokens": 77,
        "rows": 2,
        # Its default negative embeddings are zeros, which do not travel.
        "embeddings": 1,
        "config": {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
    },
    "sd15": {
        "class": "UNet2DConditionModel",
        "size": 512,
        "tokens": 77,
        "rows": 2,
        "embeddings": 2,
        "config": {
            "block_out_channels": [320, 640, 1280, 1280],
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
    },
    "sd3_medium": {
        "class": "SD3Transformer2DModel",
        "size": 1024,
        # CLIP's and T5's.
        "tokens": 77 + 256,
        "rows": 2,
        "config": {
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
    },
    "flux": {
        "class": "FluxTransformer2DModel",
        "size": 1024,
        "tokens": 512,
        # Guidance is an input: there is no second row.
        "rows": 1,
        "config": {
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "guidance_embeds": True,
        },
    },
}


def shares(name: str) -> dict[str, Any]:
    """Results `NAME.CUT.…` for one of the shapes and a step in half precision."""
    import diffusers
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from split_common.models.denoisers.registry import DENOISERS
    from split_common.models.denoisers.spec import CUTS
    from split_common.protocol import payloads

    shape = SHAPES[name]
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):
        model = getattr(diffusers, shape["class"])(**shape["config"]).half()
        with counter, torch.no_grad():
            model(**_inputs(model.config, **shape))
    flops = {
        module.removeprefix(f"{shape['class']}."): sum(counts.values())
        for module, counts in counter.get_flop_counts().items()
    }
    parameters = {key: parameter.numel() for key, parameter in model.named_parameters()}
    checkpoint: Any = SimpleNamespace(name=name, adapter_names=frozenset())
    spec: Any = DENOISERS[shape["class"]](checkpoint, dict(model.config))
    results: dict[str, Any] = {}
    for cut in CUTS:
        split = spec.split(cut)
        mine = sum(count for key, count in parameters.items() if not spec.in_body(key, split))
        theirs = {module for module in flops if _is_body(spec, split, module)}
        # Only the outermost modules, so that nothing is counted twice.
        body = sum(flops[module] for module in theirs if not theirs.intersection(_around(module)))
        up_shapes = step_shapes(spec, split, **shape)
        down = spec.output_shape(split, up_shapes)
        for codec, coded in CODECS.items():
            codecs: list[Any] = [coded, "float16", *[coded] * (len(up_shapes) - 2)]
            arrays = [payloads.Array(each, up) for each, up in zip(codecs, up_shapes, strict=True)]
            results[f"{name}.{cut}.{codec}.bytes_up_per_step"] = sum(array.nbytes for array in arrays)
            results[f"{name}.{cut}.{codec}.bytes_down_per_step"] = payloads.Array(codecs[0], down).nbytes
        results |= {
            f"{name}.{cut}.device_flops_share": 1 - body / flops["Global"],
            f"{name}.{cut}.device_params_share": mine / sum(parameters.values()),
            f"{name}.{cut}.embeddings_bytes": _embeddings(model.config, **shape),
        }
    return results


def _is_body(spec: Any, split: Any, module: str) -> bool:
    """Whether the worker runs all of a module. The upsampler of a UNet body's last block runs on the device."""
    last = f"up_blocks.{spec.levels - split.first - 1}" if spec.component == "unet" else None
    return module not in ("", last) and spec.in_body(f"{module}.", split)


def _around(module: str) -> list[str]:
    """Names of the modules that contain a module."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _inputs(settings: Any, size: int, tokens: int, rows: int, **shape: Any) -> dict[str, Any]:
    """Arguments of a call of the denoiser, on the meta device."""
    import torch

    def half(*sizes: int) -> torch.Tensor:
        return torch.empty(*sizes, dtype=torch.half)

    latent = size // 8
    match shape["class"]:
        case "UNet2DConditionModel":
            return {
                "sample": half(rows, 4, latent, latent),
                "timestep": torch.empty((), dtype=torch.long),
                "encoder_hidden_states": half(rows, tokens, settings.cross_attention_dim),
                "added_cond_kwargs": {"text_embeds": half(rows, 1280), "time_ids": half(rows, 6)},
            }
        case "SD3Transformer2DModel":
            return {
                "hidden_states": half(rows, settings.in_channels, latent, latent),
                "encoder_hidden_states": half(rows, tokens, settings.joint_attention_dim),
                "pooled_projections": half(rows, settings.pooled_projection_dim),
                "timestep": half(rows),
            }
    return {
        "hidden_states": half(rows, (latent // 2) ** 2, settings.in_channels),
        "encoder_hidden_states": half(rows, tokens, settings.joint_attention_dim),
        "pooled_projections": half(rows, settings.pooled_projection_dim),
        "timestep": half(rows),
        "guidance": half(rows),
        "txt_ids": half(tokens, 3),
        "img_ids": half((latent // 2) ** 2, 3),
    }


def step_shapes(spec: Any, split: Any, size: int, tokens: int, rows: int, **_: Any) -> list[list[int]]:
    """Shapes of the tensors that are sent to the worker at each step."""
    latent = size // 8
    if spec.component == "unet":
        side = latent >> split.first
        return [[rows, spec.channels[split.first - 1], side, side], [rows, spec.embedding]]
    return [[rows, (latent // 2) ** 2, spec.width], [rows, spec.width], [rows, tokens, spec.width]]


def _embeddings(settings: Any, size: int, tokens: int, **shape: Any) -> int:
    """Bytes that are sent once for an image."""
    match shape["class"]:
        case "UNet2DConditionModel":
            return int(shape["embeddings"] * tokens * settings.cross_attention_dim * 2)
        case "FluxTransformer2DModel":
            return ((size // 16) ** 2 + tokens) * 3 * 4
    return 0

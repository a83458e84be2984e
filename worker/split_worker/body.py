"""The body that a worker serves: a model's middle layers, loaded into a runner."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from split_common.compat.transformers import no_split_modules
from split_common.engine.linear import pack_linears
from split_common.engine.runner import Runner
from split_common.errors import ModelError
from split_common.part import Plan, load_part
from split_common.split import Split

#: Share of what is free that keys and values get unless told otherwise; the rest is for what a forward needs.
CPU_SHARE = 0.5
CUDA_SHARE = 0.85

#: Share of what is free on a GPU that weights may take.
WEIGHTS_SHARE = 0.9

#: Most bytes of main memory, which other processes want too, that they get unless told otherwise.
CPU_MOST = 4 * 1024**3


class Body(Runner):
    """A loaded body.

    Args:
        plan: the model.
        split: which layers are the body's.
        device: where it runs.
        dtype: what it computes in; None takes the checkpoint's.
        kv_bytes: memory for keys and values; None takes a share of what is free.

    Raises:
        ModelError: the part cannot be loaded, or the memory holds no page of tokens.
    """

    def __init__(
        self,
        plan: Plan,
        split: Split,
        device: torch.device,
        dtype: torch.dtype | None = None,
        kv_bytes: int | None = None,
    ) -> None:
        model, stack = load_part(plan, split, "worker", dtype=dtype)
        self.parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        if device.type == "cpu":
            pack_linears(model)
        else:
            place_on_gpus(model, self.parameter_bytes, device)
        places = {parameter.device for parameter in model.parameters()}
        free = len(places) * min(free_memory(place) for place in places)
        super().__init__(stack, split, plan.text_config, kv_bytes if kv_bytes is not None else free)


def place_on_gpus(model: Any, parameter_bytes: int, device: torch.device) -> None:
    """Moves a body to a GPU, or spreads it over all of them where one is too small (by accelerate's device map).

    Raises:
        ModelError: they are too small together.
    """
    if parameter_bytes < WEIGHTS_SHARE * torch.cuda.mem_get_info(device)[0]:
        model.to(device)
        return
    free = {index: torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())}
    most = {index: int(WEIGHTS_SHARE * bytes_) for index, bytes_ in free.items()}
    if parameter_bytes > sum(most.values()):
        raise ModelError(
            f"{parameter_bytes:,} bytes of weights do not fit on {len(free)} GPUs with {sum(free.values()):,} "
            "free: serve fewer layers (--layers), or use --dtype bfloat16 or --device cpu"
        )
    from accelerate import dispatch_model, infer_auto_device_map

    places = infer_auto_device_map(model, most, no_split_module_classes=no_split_modules(model))
    dispatch_model(model, places)


def free_memory(device: torch.device) -> int:
    """Bytes that keys and values may have on a device by default."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * CUDA_SHARE)
    return min(CPU_MOST, int(psutil.virtual_memory().available * CPU_SHARE))

"""The body that a worker serves: a model's middle layers, loaded into a runner."""

from __future__ import annotations

import psutil
import torch

from split_common.engine.linear import pack_linears
from split_common.engine.runner import Runner
from split_common.part import Plan, load_part
from split_common.split import Split

#: Share of what is free that keys and values get unless told otherwise; the rest is for what a forward needs.
CPU_SHARE = 0.5
CUDA_SHARE = 0.85

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
        model.to(device)
        self.parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        if device.type == "cpu":
            pack_linears(model)
        super().__init__(stack, split, plan.text_config, kv_bytes if kv_bytes is not None else free_memory(device))


def free_memory(device: torch.device) -> int:
    """Bytes that keys and values may have on a device by default."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * CUDA_SHARE)
    return min(CPU_MOST, int(psutil.virtual_memory().available * CPU_SHARE))

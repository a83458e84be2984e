"""The LM head of `generate` by our own code, for the numbers of rows for which that takes less time here."""

from __future__ import annotations

import copy
import ctypes
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear as apply_linear

from split_common.compat.torch import fingerprint
from split_common.engine import native
from split_common.engine.fused_call import OwnProduct
from split_common.engine.fused_sketch import OtherShape
from split_common.engine.linear import LINEAR_TOLERANCE, is_plain
from split_common.engine.tuning import SAMPLE_BYTES, CandidateTimes, faster, in_turns, kept_times

log = logging.getLogger(__name__)

#: Numbers of rows that are measured. More are computed as before.
ROWS = (1, 2, 4, 16)


class OwnHead:
    """Takes the place of a linear layer's `forward`. Any thread may call it.

    Args:
        head: the layer.
    """

    def __init__(self, head: nn.Linear) -> None:
        self._head, self._plain = head, head.forward
        self._product: OwnProduct | None = None
        self._is_faster: Callable[[int], bool] = lambda _rows: False
        self._address = 0
        self._library: ctypes.CDLL
        vars(head)["forward"] = self
        #: Of the layer as it was loaded.
        self._fingerprint = fingerprint([head])

    @torch.inference_mode()
    def build(self, library: ctypes.CDLL) -> None:
        """Uses the code from now on, where it gives the same output in less time. Raises OtherShape."""
        head = self._head
        self._library = library
        product = OwnProduct(library, head)
        states = _states(5, head.in_features)
        wanted = self._plain(states)
        differs = float((product(states) - wanted).abs().max() / wanted.abs().max())
        if not differs < LINEAR_TOLERANCE[torch.float32]:
            raise OtherShape(f"its output differs by {differs:.1e}")
        outputs = max(1, min(head.out_features, SAMPLE_BYTES // head.weight[:1].nbytes))
        some, weight = OwnProduct(library, head, outputs), head.weight[:outputs]

        def measure() -> CandidateTimes:
            candidates: dict[str, Callable[[int], Callable[[], object]]] = {
                "own": lambda rows: lambda states=_states(rows, head.in_features): some(states),  # type: ignore[misc]
                "plain": lambda rows: lambda states=_states(rows, head.in_features): apply_linear(states, weight),  # type: ignore[misc]
            }
            return in_turns(candidates, ROWS)

        times = kept_times(["head", native.code_name(), str(tuple(head.weight.shape))], measure)
        self._is_faster = faster(times, "own", "plain")
        self._read()

    def _read(self) -> None:
        """Has the weight read where it lies by now."""
        self._product, self._address = OwnProduct(self._library, self._head), self._head.weight.data_ptr()

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        if self._product is not None and self._takes(states):
            if self._head.weight.data_ptr() != self._address:
                self._read()
            return self._product(states.detach())
        output: torch.Tensor = self._plain(states)
        return output

    def _takes(self, states: torch.Tensor) -> bool:
        if not is_plain_call(states):
            return False
        rows = states.numel() // max(1, states.shape[-1])
        if not (0 < rows <= ROWS[-1] and states.shape[-1] == self._head.in_features and self._is_faster(rows)):
            return False
        return fingerprint([self._head]) == self._fingerprint

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Copies of the layer compute by themselves.
        return MethodType(type(self._head).forward, copy.deepcopy(self._head, memo))


def is_plain_call(states: torch.Tensor) -> bool:
    """Whether our own code can take such states here: float32 on the CPU, without gradients or autocast."""
    if states.dtype != torch.float32 or states.device.type != "cpu":
        return False
    wants_gradient = states.requires_grad and torch.is_grad_enabled()
    return not (wants_gradient or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


def _states(rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator, dtype=torch.float32, device="cpu")


def own_head(model: Any) -> OwnHead | None:
    """Prepares a model's LM head; None if it is not a plain linear layer in fp32 on the CPU."""
    head = model.get_output_embeddings()
    if head is None or not is_plain(head) or head.weight.dtype != torch.float32 or head.weight.device.type != "cpu":
        return None
    return OwnHead(head)

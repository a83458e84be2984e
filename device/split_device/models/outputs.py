"""Outputs of single layers that a caller asks for: what the device has, and stand-ins for what is on the worker.

transformers captures them by hooks on the layers of a model (`output_hidden_states`, `output_attentions`). Slots of
the body add their own: the hidden states before and after the body, which are known here, and stand-ins for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from split_common.compat.transformers import active_captures, capture
from split_common.errors import UnsupportedFeature

#: Outputs that are given as far as the device has them.
PARTIAL = ("output_hidden_states", "output_attentions")

#: Outputs that are of no use in part: losses are computed from those of all layers.
REFUSED = ("output_router_logits",)


class OnWorkerOutput:
    """Stands in for an output of a layer that is on the worker.

    Args:
        name: what it is, for messages.
        like: a tensor of the same shape, dtype and device; None if they are not known here.
    """

    def __init__(self, name: str, like: torch.Tensor | None = None) -> None:
        self._name = name
        if like is not None:
            self.shape, self.dtype, self.device = like.shape, like.dtype, like.device

    def __repr__(self) -> str:
        return f"<{self._name}, on the worker>"

    def __getattr__(self, name: str) -> Any:
        # Protocols of Python ask for special methods, and take an AttributeError for a no.
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, _func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UnsupportedFeature("outputs of the body's layers are on the worker")

    def _refuse(self) -> NoReturn:
        raise UnsupportedFeature(f"{self._name} are not here: they are on the worker")


#: Operators, which Python looks up in a class.
_OPERATORS = ("add", "sub", "mul", "truediv", "matmul", "pow", "neg", "getitem", "len", "iter", "bool", "float")
for _name in (*_OPERATORS, *(f"r{operator}" for operator in _OPERATORS[:6])):
    setattr(OnWorkerOutput, f"__{_name}__", lambda self, *_: self._refuse())


def record(index: int, captured: Mapping[str, int], hidden: torch.Tensor, output: torch.Tensor | None) -> None:
    """Adds the outputs of a slot of the body to those that transformers is capturing, if any.

    Args:
        index: the slot's.
        captured: how many outputs of each kind the slot's layer has, by name.
        hidden: its input, which is the real one for the body's first slot.
        output: its output; None if it is on the worker.
    """
    if (active := active_captures()) is None:
        return
    for name, count in captured.items():
        if name not in active:
            continue
        if name == "hidden_states" and not active[name]:
            capture(active, name, hidden)
        for _ in range(count):
            what = f"{name} of layer {index}"
            if name != "hidden_states":
                capture(active, name, OnWorkerOutput(what))
            else:
                capture(active, name, output if output is not None else OnWorkerOutput(what, hidden))


def logits_to_keep(options: Mapping[str, Any]) -> int | None:
    """Of how many of a call's last tokens nothing but the logits is asked for, and of the others nothing at all.

    None if that is not known: of the outputs of single layers, see `record`.
    """
    count = options.get("logits_to_keep")
    return count if isinstance(count, int) and count > 0 and options.get("labels") is None else None


def refuse_outputs(options: Mapping[str, Any], captured: Mapping[str, int], *, eager: bool) -> None:
    """Raises UnsupportedFeature for outputs that cannot be given, not even in part.

    Args:
        options: of a call, by name.
        captured: how many outputs of each kind a layer of the body has. Other code than transformers' hooks may
            gather further ones, and takes them from the body's slots.
        eager: whether attention is computed in such a way that its weights can be put out.
    """
    for option in (*PARTIAL, *REFUSED):
        if not options.get(option):
            continue
        if option in REFUSED or not captured.get(option.removeprefix("output_")):
            raise UnsupportedFeature(
                f"{option} does not run split: what the body's layers put out is on the worker"
            )
        if option == "output_attentions" and not eager:
            raise UnsupportedFeature(f'{option} needs set_attn_implementation("eager")')

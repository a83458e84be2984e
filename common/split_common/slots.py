"""A model as a stack of slots: the same transformers class on both sides, with other layers in its slots.

Both sides keep all slots and their original indices. On the device the body's slots, on the worker the head's and
the tail's, hold layers without parameters. Masks, rotary embeddings, caches and `generate` stay transformers' own
code, so that no architecture is named anywhere. What the code relies on is probed when a model is loaded: that
each slot is called once and in order, that its input is one tensor `[batch, tokens, hidden]`, and that nothing else
that it is handed depends on the text.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from split_common.errors import UnsupportedArchitecture

#: What a decoder layer returns: the hidden states, or a tuple that begins with them.
LayerStyle = type[torch.Tensor] | type[tuple[Any, ...]]


def find_stack(model: nn.Module, layers: int) -> tuple[nn.Module, str]:
    """The module that owns the stack of decoder layers, and the stack's attribute name.

    Raises:
        UnsupportedArchitecture: there is no `ModuleList` of `layers` entries.
    """
    level = [model]
    while level:
        for module in level:
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == layers:
                    return module, name
        level = [child for module in level for child in module.children()]
    raise UnsupportedArchitecture(f"{type(model).__name__} has no stack of {layers} layers to cut")


class PassThrough(nn.Module):
    """A slot whose layer is on the other side: returns its input, in the manner of the model's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.returns_tuple = False

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.wrap(hidden)

    def wrap(self, hidden: torch.Tensor) -> Any:
        return (hidden, None) if self.returns_tuple else hidden


class Absent(nn.Module):
    """Takes the place of an embedding, norm or head that the other side has; what flows through it is not used."""

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return states if states.is_floating_point() else torch.zeros(*states.shape, 1, device=states.device)


class _Recorder(PassThrough):
    """Notes what a slot is called with."""

    def __init__(self, calls: list[tuple[int, Any, dict[str, Any]]], index: int, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self._calls = calls
        self._index = index

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        named = {f"argument {i + 1}": value for i, value in enumerate(args)} | kwargs
        self._calls.append((self._index, hidden, named))
        return self.wrap(hidden)


class Stack:
    """The slots of a loaded model, and how they are called.

    Args:
        model: a causal language model of transformers.
        layers: the number of its decoder layers.

    Raises:
        UnsupportedArchitecture: the model cannot be cut between its layers; the message says why.
    """

    def __init__(self, model: nn.Module, layers: int) -> None:
        self.owner, self.attribute = find_stack(model, layers)
        self.name = type(model).__name__
        parameters = inspect.signature(inspect.unwrap(type(self.owner).forward)).parameters
        #: What this version of transformers calls the cache.
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
        self.takes_positions = "position_ids" in parameters
        self._width = self._probe_width(model)
        self.returns_tuple = self._probe()
        for slot in self.slots:
            if isinstance(slot, PassThrough):
                slot.returns_tuple = self.returns_tuple

    @property
    def slots(self) -> nn.ModuleList:
        stack = getattr(self.owner, self.attribute)
        assert isinstance(stack, nn.ModuleList)
        return stack

    @staticmethod
    def _probe_width(model: Any) -> int:
        embeddings = model.get_input_embeddings()
        weight = getattr(embeddings, "weight", None)
        return int(weight.shape[1]) if weight is not None else int(model.config.get_text_config().hidden_size)

    def _probe(self) -> bool:
        """Whether layers return tuples. Runs the owner's own code over recorders in place of its layers."""
        reasons = []
        for returns_tuple in (False, True):
            try:
                first, second = self._record(returns_tuple), self._record(returns_tuple)
            except Exception as error:
                reasons.append(f"{type(error).__name__}: {error}")
                continue
            order = [index for index, _, _ in first]
            if order != list(range(len(self.slots))):
                reasons.append(f"its layers are called in the order {order}")
            elif any(getattr(hidden, "ndim", 0) != 3 for _, hidden, _ in first):
                reasons.append("its layers are not handed one tensor [batch, tokens, hidden]")
            else:
                self._refuse_side_channels(first, second)
                return returns_tuple
        raise UnsupportedArchitecture(f"{self.name} cannot be cut between its layers: {'; '.join(reasons)}")

    @torch.no_grad()
    def _record(self, returns_tuple: bool) -> list[tuple[int, Any, dict[str, Any]]]:
        calls: list[tuple[int, Any, dict[str, Any]]] = []
        recorders = nn.ModuleList(_Recorder(calls, i, returns_tuple) for i in range(len(self.slots)))
        reference = next(self.owner.parameters(), None)
        device, dtype = (reference.device, reference.dtype) if reference is not None else (None, None)
        slots = self.slots
        setattr(self.owner, self.attribute, recorders)
        try:
            embeddings = torch.randn(1, 3, self._width, device=device, dtype=dtype)
            output = self.owner(inputs_embeds=embeddings, use_cache=False)
        finally:
            setattr(self.owner, self.attribute, slots)
        hidden = output[0]
        if hidden.ndim != 3:
            raise ValueError("the stack's output is no tensor [batch, tokens, hidden]")
        return calls

    def _refuse_side_channels(self, first: list[Any], second: list[Any]) -> None:
        """The other side rebuilds masks and rotary embeddings; what depends on the text it cannot rebuild."""
        for (index, _, one), (_, _, other) in zip(first, second, strict=True):
            for name, value in one.items():
                if not _same(value, other.get(name)):
                    raise UnsupportedArchitecture(
                        f"{self.name} hands layer {index} `{name}`, which depends on the text and does not travel"
                    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return True

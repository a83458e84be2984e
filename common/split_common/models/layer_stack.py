"""A model as a stack of slots: the same transformers class on both sides, with other layers in its slots.

Both sides keep all slots and their original indices. Layers without parameters fill the body's slots on the device,
and the head's and the tail's on the worker. Masks, rotary embeddings, caches and `generate` stay transformers' own
code, so that no architecture is named anywhere. Loading a model probes what the code relies on: each slot is called
once and in order, its input is one tensor `[batch, tokens, hidden]`, and none of its other arguments depends on the
text. It also finds out whether a token's arguments depend on the positions after it, because some rotary embeddings
choose their frequencies by the largest position, and whether attention has the windows that the cache has.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from split_common.compat.torch import twin_with
from split_common.compat.transformers import cache_name, forward_parameters
from split_common.errors import UnsupportedArchitecture
from split_common.models.spans import has_spans

#: `max_positions` of a model that names no limit.
UNLIMITED = 2**31

#: Tokens in the windows of a probe.
PROBE_WINDOW = 4

#: Most axes that positions may have: one for time, two for a picture.
MAX_POSITION_AXES = 3


def find_stack(model: Any, layers: int) -> tuple[nn.Module, str]:
    """The module that owns the stack of decoder layers, and the name of the stack's attribute.

    Raises:
        UnsupportedArchitecture: the model has no `ModuleList` of `layers` entries.
    """
    # The tower of a model that sees images may have as many layers, nearer to the root.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    level = [decoder, model] if isinstance(decoder, nn.Module) else [model]
    while level:
        for module in level:
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == layers:
                    return module, name
        level = [child for module in level for child in module.children()]
    raise UnsupportedArchitecture(f"{type(model).__name__} has no stack of {layers} layers to cut")


def floating_parameter(module: nn.Module) -> nn.Parameter | None:
    """The first parameter of a module that is not quantized, which says where and in which dtype it computes."""
    return next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)


def max_positions(config: Any) -> int:
    """How many positions a sequence may have by a model's configuration; `UNLIMITED` if it does not say.

    With YaRN (https://arxiv.org/abs/2309.00071) these are the original ones times the factor, and with linear
    scaling `max_position_embeddings` times the factor, as in vLLM. Other scalings are part of
    `max_position_embeddings`, or, like dynamic NTK, would change the keys of earlier tokens beyond it.
    """
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return UNLIMITED
    rope = getattr(text, "rope_parameters", None)
    # Layers of several types have an entry each, and their models name the length that they were trained for.
    if not isinstance(rope, dict) or not isinstance(factor := rope.get("factor"), int | float):
        return positions
    match rope.get("rope_type"):
        case "yarn":
            original = rope.get("original_max_position_embeddings") or positions
            return max(positions, int(original * factor))
        case "linear":
            return max(positions, int(positions * factor))
    return positions


class PassThrough(nn.Module):
    """A slot whose layer is on the other side: returns its input, in the manner of the model's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.returns_tuple = False

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.wrap(hidden)

    def wrap(self, hidden: torch.Tensor) -> Any:
        """What a layer of this model returns for an output."""
        return (hidden, None) if self.returns_tuple else hidden

    def imitate(self, layer: nn.Module) -> None:
        """Copies the settings of a layer that the code around it may read, such as its type of attention."""
        for name, value in vars(layer).items():
            if isinstance(value, str | int | float) and not name.startswith("_") and name not in vars(self):
                setattr(self, name, value)


class Absent(nn.Module):
    """Stands in for an embedding, norm or head that only the other side has. Its output is not used."""

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = states.is_floating_point() and states.ndim > 2
        return states if hidden else torch.zeros((), device=states.device)


class _Recorder(PassThrough):
    """Records what a slot is called with. Returns its input, or zeros, to which additions are exact."""

    def __init__(
        self, calls: list[_CallOfSlot], index: int, layer: nn.Module, returns_tuple: bool, zeros: bool = False
    ) -> None:
        super().__init__()
        self.imitate(layer)
        self.returns_tuple = returns_tuple
        self._calls = calls
        self._index = index
        self._zeros = zeros

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        named = {f"argument {i + 1}": value for i, value in enumerate(args)} | kwargs
        self._calls.append((self._index, hidden, named))
        return self.wrap(torch.zeros_like(hidden) if self._zeros else hidden)


#: A slot's index, its input, and its other arguments by name.
_CallOfSlot = tuple[int, Any, dict[str, Any]]


class LayerStack:
    """The slots of a loaded model, and how they are called.

    Args:
        model: a causal language model of transformers.
        layers: the number of its decoder layers.

    Raises:
        UnsupportedArchitecture: the model cannot be cut between its layers; the message says why.
    """

    def __init__(self, model: Any, layers: int) -> None:
        owner, self.attribute = find_stack(model, layers)
        #: The module that calls the layers.
        self.owner: Any = owner
        self.name = type(model).__name__
        config = model.config.get_text_config(decoder=True)
        #: How many positions a sequence may have.
        self.max_positions = max_positions(model.config)
        #: What this version of transformers calls the cache.
        self.cache_name = cache_name(type(self.owner))
        #: Whether the owner takes `position_ids`.
        self.takes_positions = "position_ids" in forward_parameters(type(self.owner))
        #: The dtype that the layers were loaded in.
        self.dtype: torch.dtype = model.dtype
        embeddings = getattr(model.get_input_embeddings(), "weight", None)
        #: Width of the embeddings that the owner takes.
        self.width = int(embeddings.shape[1] if embeddings is not None else config.hidden_size)
        self.returns_tuple = self._probe()
        #: Whether a token's arguments depend on the largest position of the call.
        self.positions_interact = self._probe_positions()
        self._refuse_windows_of_the_cache_alone()
        #: How many axes its positions may have: 3 where images have a height and a width; 1 for most models.
        self.position_axes = self._probe_axes()
        #: Whether tokens, such as those of an image, may attend to each other both ways.
        self.has_spans = has_spans(model, self.width)
        for slot in self.slots:
            if isinstance(slot, PassThrough):
                slot.returns_tuple = self.returns_tuple

    @property
    def slots(self) -> nn.ModuleList:
        stack = getattr(self.owner, self.attribute)
        assert isinstance(stack, nn.ModuleList)
        return stack

    def _probe(self) -> bool:
        """Whether layers return tuples. Runs the owner's code with recorders in place of its layers."""
        reasons: dict[str, None] = {}
        for returns_tuple in (False, True):
            try:
                first, second = self._record(returns_tuple, seed=0), self._record(returns_tuple, seed=1)
            except Exception as error:
                reasons[f"{type(error).__name__}: {error}"] = None
                continue
            order = [index for index, _, _ in first]
            if order != list(range(len(self.slots))):
                reasons[f"its layers are called in the order {order}"] = None
            elif any(getattr(hidden, "ndim", 0) != 3 for _, hidden, _ in first):
                reasons["its layers are not handed one tensor [batch, tokens, hidden]"] = None
            else:
                self._refuse_side_channels(first, second)
                return returns_tuple
        raise UnsupportedArchitecture(f"{self.name} cannot be cut between its layers: {'; '.join(reasons)}")

    def _probe_positions(self) -> bool:
        if not self.takes_positions or not 3 < self.max_positions < UNLIMITED:
            return False
        mask = torch.ones(1, 3, dtype=torch.long)
        try:
            near, far = (
                self._record(self.returns_tuple, position_ids=torch.tensor([[0, 1, last]]), attention_mask=mask)
                for last in (2, self.max_positions - 1)
            )
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UnsupportedArchitecture(f"{self.name} cannot be cut between its layers: {reason}") from None
        return not all(
            _same(_first_two(one), _first_two(other)) for (*_, one), (*_, other) in zip(near, far, strict=True)
        )

    def _refuse_windows_of_the_cache_alone(self) -> None:
        """Raises UnsupportedArchitecture if a cache drops tokens that the masks of a long prompt show.

        Such a model computes another function if a prompt comes in chunks. The probe shrinks the windows, so that a
        short prompt exceeds them.
        """
        config, original = copy.deepcopy(self.owner.config), self.owner.config
        text = config.get_text_config(decoder=True)
        for name in ("sliding_window", "attention_chunk_size"):
            if isinstance(getattr(text, name, None), int):
                setattr(text, name, PROBE_WINDOW)
        layers = DynamicCache(config=text).layers
        windowed = [index for index, layer in enumerate(layers) if getattr(layer, "is_sliding", False)]
        if not windowed:
            return
        self.owner.config = config
        try:
            calls = self._record(
                self.returns_tuple,
                tokens=2 * PROBE_WINDOW,
                use_cache=True,
                **{self.cache_name: DynamicCache(config=text)},
            )
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UnsupportedArchitecture(f"{self.name} cannot be cut between its layers: {reason}") from None
        finally:
            self.owner.config = original
        for index in windowed:
            if not any(map(_hides_the_first_token, calls[index][2].values())):
                raise UnsupportedArchitecture(
                    f"{self.name}: the cache of layer {index} has a window and its attention has none, so that a "
                    "prompt in one piece and in chunks gives different outputs"
                )

    def _probe_axes(self) -> int:
        """The least number of axes, above 1, whose positions may differ; 1 if there is none."""
        if not self.takes_positions or self.positions_interact:
            return 1
        mask, text = torch.ones(1, 3, dtype=torch.long), torch.arange(3)[None]
        plain = self._record(self.returns_tuple, position_ids=text, attention_mask=mask)
        for axes in range(2, MAX_POSITION_AXES + 1):
            agreeing = text.expand(axes, 1, 3)
            try:
                same = self._record(self.returns_tuple, position_ids=agreeing, attention_mask=mask)
                each = [
                    self._record(self.returns_tuple, position_ids=_shifted(agreeing, axis), attention_mask=mask)
                    for axis in range(axes)
                ]
            except Exception:
                continue
            if _same_arguments(same, plain) and not any(_same_arguments(other, plain) for other in each):
                return axes
        return 1

    @torch.no_grad()
    def additions(self, arguments: dict[str, Any], more: dict[str, Any]) -> dict[int, torch.Tensor]:
        """What the owner adds to hidden states between slots, e.g. features of images (DeepStack).

        Args:
            arguments: of a call of the owner, without a cache.
            more: further ones, which may be why it does.

        Returns:
            What is added, `[batch, tokens, width]`, by the index of the slot after which it is.

        Raises:
            UnsupportedArchitecture: what the slots are handed beside hidden states depends on `more`.
        """
        plain, added = (self._calls_of_twin(given) for given in (arguments, {**arguments, **more}))
        if not all(_same(one, other) for (*_, one), (*_, other) in zip(plain, added, strict=True)):
            raise UnsupportedArchitecture(f"{self.name} hands its layers {', '.join(more)}, which do not travel")
        return {
            index: after - before
            for (index, *_), (_, before, _), (_, after, _) in zip(plain[:-1], plain[1:], added[1:], strict=True)
            if not torch.equal(before, after)
        }

    @torch.no_grad()
    def arguments_of(self, positions: torch.Tensor) -> dict[int, dict[str, Any]]:
        """What each slot is handed beside hidden states, by its index, for positions int64 `[1, tokens]`.

        Runs the owner's code without the slots. The owner has to take positions.
        """
        states = torch.zeros(1, positions.shape[1], self.width, dtype=self.dtype)
        calls = self._calls_of_twin({"inputs_embeds": states, "position_ids": positions})
        return {index: arguments for index, _, arguments in calls}

    def _calls_of_twin(self, arguments: dict[str, Any]) -> list[_CallOfSlot]:
        """What a call of the owner hands its slots, without running them. Recorders in their place return zeros."""
        calls: list[_CallOfSlot] = []
        recorders = self._recorders(calls, self.returns_tuple, zeros=True)
        twin_with(self.owner, self.attribute, recorders)(**arguments, use_cache=False)
        return calls

    def _recorders(self, calls: list[_CallOfSlot], returns_tuple: bool, zeros: bool = False) -> nn.ModuleList:
        return nn.ModuleList(_Recorder(calls, i, slot, returns_tuple, zeros) for i, slot in enumerate(self.slots))

    @torch.no_grad()
    def _record(
        self, returns_tuple: bool, seed: int = 0, tokens: int = 3, use_cache: bool = False, **inputs: Any
    ) -> list[_CallOfSlot]:
        calls: list[_CallOfSlot] = []
        for module in self.owner.modules():
            for name in getattr(module, "absent_parameters", ()):
                setattr(module, name, torch.full_like(getattr(module, name), seed))
        slots = self.slots
        recorders = self._recorders(calls, returns_tuple)
        reference = floating_parameter(self.owner)
        device, dtype = (reference.device, reference.dtype) if reference is not None else (None, None)
        setattr(self.owner, self.attribute, recorders)
        try:
            embeddings = torch.randn(1, tokens, self.width, generator=torch.Generator().manual_seed(seed))
            inputs = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in inputs.items()
            }
            output = self.owner(inputs_embeds=embeddings.to(device, dtype), use_cache=use_cache, **inputs)
        finally:
            setattr(self.owner, self.attribute, slots)
        if output[0].ndim != 3:
            raise ValueError("the stack's output is not a tensor [batch, tokens, hidden]")
        return calls

    def _refuse_side_channels(self, first: list[_CallOfSlot], second: list[_CallOfSlot]) -> None:
        """Raises UnsupportedArchitecture if an argument depends on the text: the other side cannot rebuild it."""
        for (index, _, one), (_, _, other) in zip(first, second, strict=True):
            for name, value in one.items():
                if not _same(value, other.get(name)):
                    raise UnsupportedArchitecture(
                        f"{self.name} hands layer {index} `{name}`, which depends on the text or on weights "
                        "beside the layers, and does not travel"
                    )


def _hides_the_first_token(mask: Any) -> bool:
    """Whether an argument of a slot is a mask `[batch, heads, queries, keys]` that hides the first token."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        return False
    seen = mask if mask.dtype == torch.bool else mask >= 0
    return not bool(seen[..., -1, 0].any())


def _shifted(positions: torch.Tensor, axis: int) -> torch.Tensor:
    shifted = positions.clone()
    shifted[axis] += 1
    return shifted


def _same_arguments(one: list[_CallOfSlot], other: list[_CallOfSlot]) -> bool:
    """Whether all slots are handed the same, except for the positions themselves."""
    return all(
        _same(_but_positions(mine), _but_positions(theirs))
        for (*_, mine), (*_, theirs) in zip(one, other, strict=True)
    )


def _but_positions(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "position_ids"}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return True


def _first_two(value: Any) -> Any:
    """The part of an argument that belongs to the first two of three tokens."""
    if isinstance(value, torch.Tensor):
        return value[:, :2] if value.ndim > 1 and value.shape[1] == 3 else value
    if isinstance(value, tuple | list):
        return [_first_two(item) for item in value]
    if isinstance(value, dict):
        return {name: _first_two(item) for name, item in value.items() if name != "position_ids"}
    return value

"""Head and tail on the CPU, each in one call of our own code, inside of transformers' own forward.

The first layer of an end computes all of them, and the others pass that on. Keys and values stay in transformers'
cache, as it would hold them. Whatever the code does not compute goes through the layers' own: padding, outputs of
single layers, adapters, hooks, other caches, gradients, and weights or modules that have changed since.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from split_common.compat.torch import fingerprint, has_global_hooks, twin_with
from split_common.compat.transformers import active_captures
from split_common.engine import native
from split_common.engine.attention import AttentionCall
from split_common.engine.attention_calls import attention_calls
from split_common.engine.fused_call import FusedCall, PageLayout, Sequences, rotary_pair
from split_common.engine.fused_sketch import OtherShape, Sketch, sketch_layers
from split_common.engine.fusing import FUSED_TOLERANCE
from split_common.engine.linear import is_plain
from split_common.engine.pool import LayerShape
from split_common.engine.tuning import LEAST_BYTES, from_environment
from split_common.models.cache_layers import TokenCounter
from split_common.models.layer_stack import LayerStack, PassThrough
from split_common.models.split import Split
from split_device.models.body import forwarding
from split_device.models.fused_head import OwnHead, is_plain_call, own_head
from split_device.models.prepared import StepContext
from split_device.models.shared import shared_copy

log = logging.getLogger(__name__)

#: Tokens of two rows in each forward that is compared: a prompt over several blocks, one token, several.
_STEPS = (40, 1, 3, 1)


class FusedEnds:
    """The ends of a model. Any thread may run the model.

    Args:
        stack: the model's slots, whose body is on the worker.
        config: the model's text configuration.
        ends: its head and its tail, as far as they have layers.
        lm_head: computes its logits; None if its own code does.
    """

    def __init__(
        self, stack: LayerStack, config: Any, ends: Sequence[FusedEnd], lm_head: OwnHead | None = None
    ) -> None:
        self._stack, self._config, self._ends, self._lm_head = stack, config, ends, lm_head
        self._lock = threading.Lock()
        #: Whether it is known if the ends can be fused.
        self._decided = False
        #: The thread that compares, and whether it computes in one call meanwhile.
        self._trial: tuple[int, bool] | None = None
        for end in ends:
            for index in end.indices:
                slot = stack.slots[index]
                slot.forward = _Forward(self, end, index, slot)
            end.note([stack.slots[index] for index in end.indices])

    @property
    def fusion(self) -> str | None:
        """`fused` if the ends are computed in one call each, `compiling` if they will be; None if neither."""
        if not self._are_unchanged():
            return None
        if not self._decided:
            return "compiling"
        return "fused" if all(end.call is not None for end in self._ends) else None

    def _are_unchanged(self) -> bool:
        return not has_global_hooks() and all(end.is_unchanged() for end in self._ends)

    def __deepcopy__(self, _memo: object) -> FusedEnds:
        return self

    def takes(self, end: FusedEnd) -> bool:
        """Whether an end can be computed in one call by now."""
        if (trial := self._trial) is not None and trial[0] == threading.get_ident():
            return trial[1]
        if not self._decided and (native.library() is not None or native.failed()):
            with self._lock:
                # What was changed since loading may be taken back: until then, nothing is known.
                if not self._decided and self._are_unchanged():
                    # Whatever the caller has set: its autocast, its default device.
                    with torch.autocast("cpu", enabled=False), torch.device("cpu"):
                        self._decide()
        return self._decided and end.call is not None

    def _decide(self) -> None:
        """Compares the ends' output with that of the layers' own code. Called under the lock."""
        try:
            if (library := native.library()) is None:
                return
            expected = self._rehearse(fused=False)
            for end in self._ends:
                end.build(library, self._stack)
            output = self._rehearse(fused=True)
            differs = float((output - expected).abs().max() / expected.abs().max())
            if not differs < FUSED_TOLERANCE:
                raise OtherShape(f"their output differs by {differs:.1e}")
        except Exception as reason:
            log.info("the device's layers are not fused: %s", reason)
            for end in self._ends:
                end.call = None
        else:
            self._fuse_head(library)
        finally:
            self._decided = True

    def _fuse_head(self, library: ctypes.CDLL) -> None:
        if self._lm_head is None:
            return
        try:
            self._lm_head.build(library)
        except Exception as reason:
            log.info("the LM head stays as it is: %s", reason)

    @torch.inference_mode()
    def _rehearse(self, *, fused: bool) -> torch.Tensor:
        """The owner's output for two rows of fixed random states, without the body: `[2, tokens, width]`."""
        stack, own = self._stack, {index for end in self._ends for index in end.indices}
        slots: list[nn.Module] = []
        cache, counter = DynamicCache(config=self._config), TokenCounter()
        cache.layers += [DynamicLayer() for _ in range(len(stack.slots) - len(cache.layers))]
        for index, slot in enumerate(stack.slots):
            if index not in own:
                empty = PassThrough()
                empty.imitate(slot)
                empty.returns_tuple = stack.returns_tuple
                cache.layers[index] = counter
                slot = empty
            slots.append(slot)
        twin = twin_with(stack.owner, stack.attribute, nn.ModuleList(slots))
        generator, outputs = torch.Generator().manual_seed(0), []
        self._trial = (threading.get_ident(), fused)
        try:
            for count in _STEPS:
                places = {"position_ids": counter.tokens + torch.arange(count)[None]}
                states = torch.randn(2, count, stack.width, generator=generator, dtype=torch.float32)
                with forwarding.entered(StepContext()) as context:
                    output = twin(
                        inputs_embeds=states,
                        use_cache=True,
                        **{stack.cache_name: cache},
                        **(places if stack.takes_positions else {}),
                    )
                if bool(context.computed) is not fused:
                    raise OtherShape("their caches or arguments are of another kind")
                counter.tokens += count
                outputs.append(output[0])
        finally:
            self._trial = None
        return torch.cat(outputs, 1)


class FusedEnd:
    """The layers of an end.

    Args:
        indices: theirs.
        layers: what each is, and what it passes to its attention.
        shape: of the keys and values of each.
        returns_tuple: whether layers of this model do.
    """

    def __init__(
        self,
        indices: Sequence[int],
        layers: Sequence[tuple[Sketch, AttentionCall]],
        shape: LayerShape,
        returns_tuple: bool,
    ) -> None:
        self.indices, self._layers, self._shape = indices, layers, shape
        self._returns_tuple = returns_tuple
        #: Computes them; None before that is built, and if they cannot be fused.
        self.call: FusedCall | None = None
        self._modules: list[nn.Module] = []
        self._fingerprint: list[object] = []
        self._addresses: list[int] = []
        self._parameters: list[nn.Parameter] = []
        #: Its norms and biases as they were, by their place among the parameters.
        self._vectors: dict[int, torch.Tensor] = {}
        self._make: Callable[[], FusedCall]
        self._rotated = -1

    def note(self, modules: Sequence[nn.Module]) -> None:
        """Remembers its layers as they are: what was seen of them holds as long as they stay so."""
        self._modules = list(modules)
        self._fingerprint = fingerprint(self._modules)
        self._parameters = [parameter for module in modules for parameter in module.parameters()]
        self._vectors = {
            place: parameter.detach().clone()
            for place, parameter in enumerate(self._parameters)
            if parameter.ndim < 2
        }

    def is_unchanged(self) -> bool:
        """Whether its layers are what they were. Matrices are read where they lie, and are not compared."""
        if fingerprint(self._modules) != self._fingerprint:
            return False
        # Norms were copied. Changes of their `data` show nowhere else. The parameters are the same ones by now.
        return all(
            one.dtype == own.dtype and one.device == own.device and torch.equal(one, own)
            for one, own in ((one, self._parameters[place]) for place, one in self._vectors.items())
        )

    def build(self, library: ctypes.CDLL, stack: LayerStack) -> None:
        """Makes the call. Raises OtherShape."""
        positions = torch.arange(2)[None]
        given = stack.arguments_of(positions) if stack.takes_positions else {}
        tables = [_rotary(given.get(index, {}).values(), 1, 2) for index in self.indices]
        if any(table is None for table in tables):
            raise OtherShape("they are handed no rotary embeddings")
        self._rotated = tables[0][0].shape[1]  # type: ignore[index]
        self._make = lambda: FusedCall(library, self._layers, stack.width, self._rotated, self._shape)
        self.call, self._addresses = self._make(), self._places()

    def wrap(self, hidden: torch.Tensor) -> Any:
        """What a layer of this model returns for an output."""
        return (hidden, None) if self._returns_tuple else hidden

    def compute(self, hidden: torch.Tensor, context: StepContext, arguments: Sequence[Any]) -> torch.Tensor | None:
        """The last layer's output `[batch, tokens, width]`; None if the layers' own code has to compute it."""
        rows, tokens, width = hidden.shape
        cache: Any = next((value for value in arguments if isinstance(value, Cache)), None)
        rotary = _rotary(arguments, rows, tokens)
        if type(cache) is not DynamicCache:
            return None
        if rotary is None or rotary[0].shape[1] != self._rotated or not is_plain_call(hidden):
            return None
        cache.layers += [DynamicLayer() for _ in range(self.indices[-1] + 1 - len(cache.layers))]
        layers = [cache.layers[index] for index in self.indices]
        past = layers[0].get_seq_length()
        if not (self._holds(layers, rows, past) and _is_full(context, rows, past + tokens)):
            return None
        if active_captures() or has_global_hooks() or not self.is_unchanged():
            return None
        if (found := self._places()) != self._addresses and not self._follow(found):
            return None
        if (call := self.call) is None:
            return None
        longer = [(self._longer(layer, "keys", hidden), self._longer(layer, "values", hidden)) for layer in layers]
        output = hidden.detach().reshape(rows * tokens, width).clone(memory_format=torch.contiguous_format)
        total, own = past + tokens, self._shape
        heads, step = own.heads, own.key_width
        call.run(
            output,
            [rotary] * len(layers),
            longer,
            PageLayout(total, step, total * step, heads * total * step),
            Sequences(
                [tokens] * rows,
                [total] * rows,
                [[row] for row in range(rows)],
                (_numbers(rows)[:, None] * total + _numbers(past, total)).flatten(),
            ),
        )
        for layer, (keys, values) in zip(layers, longer, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return output.view(rows, tokens, width)

    def _follow(self, found: list[int]) -> bool:
        """Has weights read where they lie by now. Returns whether that is possible."""
        self.call = None
        with contextlib.suppress(OtherShape):
            self.call, self._addresses = self._make(), found
        return self.call is not None

    def _places(self) -> list[int]:
        """Where its parameters lie."""
        return [parameter.data_ptr() for parameter in self._parameters]

    def _holds(self, layers: Sequence[Any], rows: int, past: int) -> bool:
        """Whether cache layers are transformers' plain ones, with so many tokens in so many rows."""
        shape = self._shape
        for layer in layers:
            if type(layer) is not DynamicLayer or layer.get_seq_length() != past:
                return False
            wanted = (rows, shape.heads, past, shape.key_width)
            if past and any(not _is_usual(each) or each.shape != wanted for each in (layer.keys, layer.values)):
                return False
        return True

    def _longer(self, layer: Any, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """Keys or values `[rows, heads, tokens, width]` of a cache layer, with room for those of the states."""
        past, (rows, tokens, _) = layer.get_seq_length(), hidden.shape
        longer = hidden.new_empty(rows, self._shape.heads, past + tokens, self._shape.key_width)
        if past:
            longer[:, :, :past] = getattr(layer, name)
        return longer


class _Forward:
    """Takes the place of a layer's `forward`."""

    def __init__(self, ends: FusedEnds, end: FusedEnd, index: int, layer: nn.Module) -> None:
        self._ends, self._end, self._index, self._layer = ends, end, index, layer
        self._plain = layer.forward

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if (context := forwarding.get()) is not None:
            if self._index in context.computed:
                return self._end.wrap(hidden)
            if self._index == self._end.indices[0] and self._ends.takes(self._end):
                output = self._end.compute(hidden, context, [*args, *kwargs.values()])
                if output is not None:
                    context.computed.update(self._end.indices)
                    return self._end.wrap(output)
        return self._plain(hidden, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Copies of a layer compute by themselves.
        return MethodType(type(self._layer).forward, copy.deepcopy(self._layer, memo))


def fuse_ends(model: Any, stack: LayerStack, split: Split) -> FusedEnds | None:
    """Has the layers of a model's head and tail fused as soon as their code is compiled.

    Args:
        model: a split model whose body has its place.
        stack, split: its slots, and where it is cut.

    Returns:
        None if they are not of the usual shape, are not on the CPU in fp32, or are too small for it to matter.

    Raises:
        ConfigError: `LAMBDA_SPLIT_TUNE` is neither `on` nor `off`.
    """
    with contextlib.suppress(OtherShape):
        ends = list(_ends(model, stack, split))
        # Else they would come with the first call that asks for outputs, and count as a change from then on.
        model.install_captures()
        return FusedEnds(stack, model.config.get_text_config(decoder=True), ends, own_head(model))
    return None


def _ends(model: Any, stack: LayerStack, split: Split) -> Iterator[FusedEnd]:
    """The ends that have layers. Raises OtherShape."""
    ranges = [range(split.first), range(split.last, split.layers)]
    own = {index for each in ranges for index in each}
    size = sum(parameter.nbytes for index in own for parameter in stack.slots[index].parameters())
    if not from_environment() or size < LEAST_BYTES or not native.begin():
        raise OtherShape("they are not to be fused")
    if len(model.split_parts.adapters):
        # Which of them is active changes no module. One that is loaded later does.
        raise OtherShape("they have adapters")
    part, copied = shared_copy(model, own)
    sketches = sketch_layers(copied, [module for module in part.modules() if is_plain(module)])
    if sketches.keys() != own:
        raise OtherShape("they are of another shape")
    noted = {each.call.layer: each for each in attention_calls(copied)}
    shapes = {each.shape for each in noted.values()}
    if noted.keys() != own or len(shapes) != 1 or any(each.others for each in noted.values()):
        raise OtherShape("their attention is another one")
    for indices in filter(len, ranges):
        layers = [(sketches[index], noted[index].call) for index in indices]
        yield FusedEnd(indices, layers, next(iter(shapes)), stack.returns_tuple)


def _rotary(arguments: Any, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The one pair of cosines and sines among a layer's arguments; None if there is none, or several."""
    pairs = [pair for value in arguments if (pair := rotary_pair(value, rows, tokens)) is not None]
    return pairs[0] if len(pairs) == 1 else None


def _numbers(*bounds: int) -> torch.Tensor:
    """`torch.arange` for code that reads int64 of the CPU, whatever the default device."""
    return torch.arange(*bounds, dtype=torch.int64, device="cpu")


def _is_usual(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _is_full(context: StepContext, rows: int, columns: int) -> bool:
    """Whether all tokens are causal, and none is padding."""
    mask = context.mask
    if context.ahead is not None or context.parents:
        return False
    return mask is None or (tuple(mask.shape) == (rows, columns) and bool(mask.all()))

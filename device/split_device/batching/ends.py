"""The device's own layers for many requests at once: head and tail run as a worker runs the body.

Both ends are copies of the device's model that share its tensors, so that `generate` goes on working on the model
itself. In each copy the layers of one range are left; a third one without any does what comes before the first
layer and after the last: embeddings, norm, logits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from split_common.compat.torch import remove_forward_hooks
from split_common.engine.linear import pack_linears, padded_rows
from split_common.engine.runner import Runner, build_runner
from split_common.part import strip
from split_common.slots import PassThrough, Stack
from split_common.split import Split

#: Bytes of keys and values of both ends, unless told otherwise.
KV_MEMORY = 1024**3


class Ends:
    """Head and tail of a split model. Not thread-safe: one thread computes.

    Args:
        model: what `SplitModelForCausalLM.from_pretrained` gives.
        kv_bytes: memory for keys and values of both ends.

    Raises:
        ModelError: the memory holds not even one page of tokens.
    """

    def __init__(self, model: Any, kv_bytes: int = KV_MEMORY) -> None:
        split: Split = model.split
        self._shell = Shell(model)
        config = model.config.get_text_config(decoder=True)
        layers = split.first + split.layers - split.last

        def runner(first: int, last: int) -> Runner | None:
            if first == last:
                return None
            part = _twin(model, range(first, last))
            strip(part, part._stack.slots)
            _lay_out(part)
            share = kv_bytes * (last - first) // layers
            return build_runner(part._stack, Split(split.layers, first, last), config, share)

        #: The layers of each end; None where there are none.
        self.head, self.tail = runner(0, split.first), runner(split.last, split.layers)
        runners = [runner for runner in (self.head, self.tail) if runner is not None]
        #: Whether tokens that were appended together must always be.
        self.indivisible = model._stack.positions_interact
        #: Tokens that there is memory for; None without layers.
        self.capacity = min((runner.store.capacity for runner in runners), default=None)
        self.max_positions: int = model._max_positions

    def embed(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """What the first layer sees of tokens at these positions, `[tokens, width]`, on the host."""
        return self._shell.embed(tokens, positions)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits, float32 `[rows, vocabulary]`, of what the last layer makes of tokens, `[rows, width]`."""
        return self._shell.logits(states)


class Shell:
    """The model without any layer."""

    def __init__(self, model: Any) -> None:
        self._model = _twin(model, range(0))
        _lay_out(self._model)
        self._stack: Stack = self._model._stack
        self._device = next(self._model.parameters()).device
        self._dtype = model.dtype
        self._seen: torch.Tensor | None = None
        self._incoming: torch.Tensor | None = None
        self._stack.slots[0].register_forward_pre_hook(self._look)
        self._stack.slots[-1].register_forward_pre_hook(self._inject)

    @torch.inference_mode()
    def embed(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([list(tokens)], device=self._device)
        self._stack.owner(input_ids=ids, **self._arguments(positions))
        seen, self._seen = self._seen, None
        assert seen is not None
        return seen[0].cpu()

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        rows = padded_rows(len(states))
        padded = pad(states, (0, 0, 0, rows - len(states)))
        self._incoming = padded[None].to(self._device, self._dtype)
        nothing = self._incoming.new_zeros(1, rows, self._stack.width)
        output = self._model(inputs_embeds=nothing, **self._arguments(range(rows)))
        self._incoming = None
        logits: torch.Tensor = output.logits[0, : len(states)]
        return logits.float().cpu()

    def _arguments(self, positions: Sequence[int]) -> dict[str, Any]:
        arguments: dict[str, Any] = {"use_cache": False}
        if self._stack.takes_positions:
            arguments["position_ids"] = torch.tensor([list(positions)], device=self._device)
        return arguments

    def _look(self, _layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen = args[0]

    def _inject(self, _layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if self._incoming is None else (self._incoming, *args[1:])


def _twin(model: Any, kept: range) -> Any:
    """A copy of a split model, with the same tensors, in which only some layers are left."""
    stack: Stack = model._stack
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    memo[id(model._closed)] = None
    for index, slot in enumerate(stack.slots):
        if index not in kept:
            empty = PassThrough()
            empty.imitate(slot)
            empty.returns_tuple = stack.returns_tuple
            memo[id(slot)] = empty
    twin = copy.deepcopy(model, memo)
    for module in (twin, twin._stack.owner):
        remove_forward_hooks(module)
    return twin


def _lay_out(model: nn.Module) -> None:
    """Makes linear layers fast for several rows, where they are on the CPU."""
    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        pack_linears(model)

"""The body: a model's middle layers, run over received hidden states with a KV cache for each row."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from split_common.errors import UnsupportedArchitecture
from split_common.part import Plan, load_part
from split_common.split import Split


class Body:
    """A loaded body. Not thread-safe: one thread computes.

    Args:
        plan: the model.
        split: which layers are the body's.
        device: where it runs.
        dtype: what it computes in; None takes the checkpoint's.

    Raises:
        ModelError: the part cannot be loaded.
    """

    def __init__(self, plan: Plan, split: Split, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._config = plan.text_config
        self._split = split
        _, self._stack = load_part(plan, split, "worker", dtype=dtype)
        self._owner = self._stack.owner.to(device)
        parameters = list(self._owner.parameters())
        self.device = device
        self.dtype = parameters[0].dtype
        self.parameter_bytes = sum(p.numel() * p.element_size() for p in parameters)
        #: Width of the hidden states.
        self.width = int(self._config.hidden_size)
        #: Positions that a row may have.
        self.max_positions = self._stack.max_positions
        self._incoming: torch.Tensor | None = None
        self._outgoing: torch.Tensor | None = None
        slots = self._stack.slots
        slots[split.first].register_forward_pre_hook(self._inject)
        slots[split.last - 1].register_forward_hook(self._capture)
        self._check()

    def _check(self) -> None:
        """Runs three tokens at once and in two steps: both must fill the cache alike and give the same output."""
        states = torch.randn(3, self.width, generator=torch.Generator().manual_seed(0))
        whole, parts = self.new_row(), self.new_row()
        try:
            expected = self.forward(whole, states, [0, 1, 2])
            output = torch.cat([self.forward(parts, states[:2], [0, 1]), self.forward(parts, states[2:], [2])])
            lengths = {layer.get_seq_length() for row in (whole, parts) for layer in row.layers}
        except Exception as error:
            raise UnsupportedArchitecture(f"{self._stack.name} cannot run its layers alone: {error}") from None
        close = (output - expected).norm() <= 0.1 * expected.norm() or not torch.isfinite(expected).all()
        if lengths != {3} or not close:
            raise UnsupportedArchitecture(f"{self._stack.name} keeps more than keys and values between steps")

    def _inject(self, _layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._incoming, *args[1:])

    def _capture(self, _layer: Any, _args: Any, output: Any) -> None:
        self._outgoing = output[0] if isinstance(output, tuple) else output

    def new_row(self) -> DynamicCache:
        """An empty KV cache for one row: of the body's layers."""
        cache = DynamicCache(config=self._config)
        cache.layers += [DynamicLayer() for _ in range(self._split.layers - len(cache.layers))]
        body = [
            WindowLayer(layer.sliding_window) if layer.is_sliding else DynamicLayer()
            for layer in cache.layers[self._split.first : self._split.last]
        ]
        alike = {layer.is_sliding: layer for layer in reversed(body)}
        # transformers takes a mask's size from the first layer of a kind, be it one that runs elsewhere.
        cache.layers = [alike.get(layer.is_sliding, body[0]) for layer in cache.layers]
        cache.layers[self._split.first : self._split.last] = body
        return cache

    @torch.inference_mode()
    def forward(self, row: DynamicCache, states: torch.Tensor, positions: list[int]) -> torch.Tensor:
        """Appends tokens to a row.

        Args:
            row: its KV cache, extended in place.
            states: hidden states `[tokens, width]`.
            positions: the tokens' rotary positions.

        Returns:
            The body's output `[tokens, width]`.
        """
        self._incoming = states[None].to(self.device, self.dtype)
        arguments: dict[str, Any] = {self._stack.cache_name: row, "use_cache": True}
        if self._stack.takes_positions:
            arguments["position_ids"] = torch.tensor([positions], device=self.device)
        self._owner(inputs_embeds=torch.zeros_like(self._incoming), **arguments)
        output, self._incoming, self._outgoing = self._outgoing, None, None
        assert output is not None
        return output[0]


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The keys and values of a sliding-window layer, all of them: a row may be cut back at any time."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        visible = self.sliding_window - 1 + key_states.shape[-2]
        keys, values = DynamicLayer.update(self, key_states, value_states, *args, **kwargs)
        self.cumulative_length = keys.shape[-2]
        return keys[..., -visible:, :], values[..., -visible:, :]


def length(row: DynamicCache) -> int:
    """Tokens in a row."""
    return int(row.layers[0].get_seq_length())


def truncate(row: DynamicCache, tokens: int) -> None:
    """Cuts a row back to its first `tokens` tokens."""
    if tokens == length(row):
        return
    for layer in row.layers:
        layer.keys = layer.keys[..., :tokens, :]
        layer.values = layer.values[..., :tokens, :]
        if layer.is_sliding:
            layer.cumulative_length = tokens


def fork(row: DynamicCache) -> DynamicCache:
    """A row that shares its tensors with another one: caches grow by making new tensors."""
    twin = copy.copy(row)
    copies = {id(layer): copy.copy(layer) for layer in row.layers}
    twin.layers = [copies[id(layer)] for layer in row.layers]
    return twin

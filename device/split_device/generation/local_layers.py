"""Runs the device's own layers for many requests at once, as a worker runs the body.

Head and tail are copies of the device's model that share its tensors, so `generate` still works on the model
itself. Each copy has the layers of one range. A third copy, without layers, does what comes before the first layer
and after the last one: embeddings, norm, logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import DynamicCache

from split_common.engine.linear import pack_linears
from split_common.engine.lora import AdapterNumber, adapting
from split_common.engine.runner import Runner, build_runner
from split_common.engine.tuning import UNMEASURED, Tuning, from_environment
from split_common.errors import ModelError, UnsupportedFeature
from split_common.models.cache_layers import TokenCounter
from split_common.models.layer_stack import LayerStack
from split_common.models.loading import strip
from split_common.models.split import Split
from split_device.generation.unused_modules import drop_unused
from split_device.models.adapters import LoadedAdapter
from split_device.models.context import CallContext
from split_device.models.language import SplitParts
from split_device.models.shared import shared_copy
from split_device.models.traits import keeps_states

#: Default memory for keys and values of head and tail together, in bytes.
KV_MEMORY = 1024**3


class LocalLayers:
    """Head and tail of a split model. Not thread-safe: one thread computes.

    Args:
        model: a model made by `SplitModelForCausalLM.from_pretrained`.
        kv_bytes: memory for keys and values of head and tail together.

    Raises:
        ModelError: the memory does not suffice for one page of tokens.
    """

    def __init__(self, model: Any, kv_bytes: int = KV_MEMORY) -> None:
        parts: SplitParts = model.split_parts
        self._adapters, self._adapter_count = parts.adapters, len(parts.adapters)
        split = parts.split
        #: What comes before the head's layers and after the tail's.
        self.ends = EmbeddingAndHead(model)
        config = model.config.get_text_config(decoder=True)
        layers = split.first + split.layers - split.last
        #: Number of logits of each token.
        self.vocabulary = int(config.vocab_size)

        def runner(first: int, last: int) -> Runner | None:
            if first == last:
                return None
            part, stack = shared_copy(model, range(first, last))
            strip(part, stack.slots)
            tuning = pack_weights(part, stack)
            share = kv_bytes * (last - first) // layers
            try:
                return build_runner(stack, Split(split.layers, first, last), config, share, tuning)
            except ModelError as error:
                raise ModelError(
                    f"layers {first}:{last} get {share:,} of the {kv_bytes:,} bytes of --kv-memory: {error}"
                ) from None

        #: The layers of head and tail; None for an end without layers.
        self.head, self.tail = runner(0, split.first), runner(split.last, split.layers)
        runners = [runner for runner in (self.head, self.tail) if runner is not None]
        #: Whether many sequences share a forward.
        self.packed = all(runner.unpacked_because is None for runner in runners)
        #: Whether a step may have several continuations.
        self.takes_trees = all(runner.takes_trees for runner in runners)
        #: Whether tokens that went through together must do so again. The worker's layers may show that later.
        self.indivisible = parts.traits.positions_interact or not all(runner.divisible for runner in runners)
        #: Whether some layer of the whole model keeps states.
        self.has_states = keeps_states(config)
        #: Bytes of a token's states that the body gets.
        self.state_bytes = int(config.hidden_size) * model.dtype.itemsize
        #: Most tokens of one sequence for which there is memory; None without layers.
        stores = [runner.store for runner in runners]
        self.capacity = min((store.capacity - store.sequence_tokens for store in stores), default=None)

    def adapter(self, name: str | None) -> LoadedAdapter | None:
        """An adapter by its name; for None the model's active one, for "" none.

        Raises:
            UnknownAdapter: the model has no adapter of this name.
            UnsupportedFeature: it was loaded after the copies were made.
        """
        if name == "":
            return None
        adapter = self._adapters.active if name is None else self._adapters.get(name)
        if adapter is not None and adapter.number >= self._adapter_count:
            raise UnsupportedFeature(
                f"the adapter {adapter.name} was loaded after the generator was made: make another generator"
            )
        return adapter

    def embed(
        self, tokens: Sequence[int], positions: Sequence[int], adapters: Sequence[AdapterNumber]
    ) -> torch.Tensor:
        """The first layer's input `[tokens, width]`, on the CPU, for tokens with these positions and adapters."""
        return self.ends.embed(tokens, positions, adapters)

    def logits(self, states: torch.Tensor, adapters: Sequence[AdapterNumber]) -> torch.Tensor:
        """Logits, float32 `[rows, vocabulary]` on the CPU, of the last layer's output `[rows, width]`."""
        return self.ends.logits(states, adapters)


@dataclass
class _Passage:
    """States that pass the slots of `EmbeddingAndHead` in one call, `[1, tokens, width]`."""

    #: Replaces the input of the last slot; None to keep it.
    incoming: torch.Tensor | None = None
    #: The input of the first slot.
    first_input: torch.Tensor | None = None


_passing: CallContext[_Passage] = CallContext("embedding and head")


class EmbeddingAndHead:
    """The model without its decoder layers."""

    def __init__(self, model: Any) -> None:
        self._model, self._stack = shared_copy(model, range(0))
        self._device = next(self._model.parameters()).device
        self._dtype = model.dtype
        self._stack.slots[0].register_forward_pre_hook(self._record)
        self._stack.slots[-1].register_forward_pre_hook(self._inject)
        self._tuning = UNMEASURED
        #: Whether embeddings depend on positions that the owner counts by its cache, as it takes none.
        self._counts = not self._stack.takes_positions and any(map(self._differs_later, (0, 1)))
        if model.split_parts.traits.axes is not None:
            # Packing copies weights, and those of the tower are not needed here.
            drop_unused(self._model, self._try)
        self._tuning = pack_weights(self._model)

    def embed(
        self, tokens: Sequence[int], positions: Sequence[int], adapters: Sequence[AdapterNumber]
    ) -> torch.Tensor:
        """The first layer's input `[tokens, width]`, on the CPU."""
        if not self._counts:
            return self._embed(tokens, adapters, self._arguments(positions))
        ends = [end for end in range(1, len(tokens)) if positions[end] != positions[end - 1] + 1] + [len(tokens)]
        parts = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        return torch.cat(
            [self._embed(tokens[part], adapters[part], self._after(positions[part.start])) for part in parts]
        )

    @torch.inference_mode()
    def _embed(
        self, tokens: Sequence[int], adapters: Sequence[AdapterNumber], arguments: dict[str, Any]
    ) -> torch.Tensor:
        ids = torch.tensor([list(tokens)], device=self._device)
        with _passing.entered(_Passage()) as passage, adapting(adapters, [1] * len(adapters)):
            self._stack.owner(input_ids=ids, **arguments)
        assert passage.first_input is not None
        return passage.first_input[0].cpu()

    @torch.inference_mode()
    def last_states(self, states: torch.Tensor) -> torch.Tensor:
        """What the model's head takes, of the last layer's output: both `[rows, width]`."""
        incoming = states[None].to(self._device, self._dtype)
        with _passing.entered(_Passage(incoming)):
            output = self._stack.owner(
                inputs_embeds=torch.zeros_like(incoming), **self._arguments(range(len(states)))
            )
        last: torch.Tensor = output[0][0]
        return last

    @torch.inference_mode()
    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits, float32 `[rows, vocabulary]`, that the model's head alone makes of states `[rows, width]`."""
        logits: torch.Tensor = self._model.get_output_embeddings()(states.to(self._device, self._dtype))
        return logits.float()

    @torch.inference_mode()
    def logits(self, states: torch.Tensor, adapters: Sequence[AdapterNumber]) -> torch.Tensor:
        rows = self._tuning.padded(len(states))
        padded = pad(states, (0, 0, 0, rows - len(states)))
        incoming = padded[None].to(self._device, self._dtype)
        placeholder = incoming.new_zeros(1, rows, self._stack.width)
        with _passing.entered(_Passage(incoming)), adapting(adapters, [1] * len(adapters), rows - len(states)):
            output = self._model(inputs_embeds=placeholder, **self._arguments(range(rows)))
        logits: torch.Tensor = output.logits[0, : len(states)]
        return logits.float().cpu()

    def _try(self) -> None:
        self.logits(self.embed([0], [0], [None]), [None])

    def _arguments(self, positions: Sequence[int]) -> dict[str, Any]:
        arguments: dict[str, Any] = {"use_cache": False}
        if self._stack.takes_positions:
            arguments["position_ids"] = torch.tensor([list(positions)], device=self._device)
        return arguments

    def _after(self, length: int) -> dict[str, Any]:
        """Arguments of the owner for tokens that follow `length` others."""
        cache, counter = DynamicCache(), TokenCounter()
        counter.tokens = length
        cache.layers = [counter] * len(self._stack.slots)
        return {self._stack.cache_name: cache, "use_cache": True}

    def _differs_later(self, token: int) -> bool:
        """Whether a token's embedding depends on its position."""
        first, second = self._embed([token, token], [None, None], self._arguments([0, 1]))
        return not torch.equal(first, second)

    def _record(self, _layer: nn.Module, args: tuple[Any, ...]) -> None:
        if (passage := _passing.get()) is not None:
            passage.first_input = args[0]

    def _inject(self, _layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        passage = _passing.get()
        return args if passage is None or passage.incoming is None else (passage.incoming, *args[1:])


def pack_weights(model: nn.Module, stack: LayerStack | None = None) -> Tuning:
    """Lays out the weights of linear layers for this CPU, if the model is on it."""
    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        return pack_linears(model, stack, measure=from_environment())
    return UNMEASURED

"""`SplitModelForCausalLM`: a language model whose middle layers run on a worker."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache

from split_common.errors import PromptTooLong, UnsupportedFeature
from split_common.manifest import find_manifest
from split_common.part import generation_config, load_part, plan
from split_common.slots import Stack
from split_common.split import END_LAYERS, Split
from split_common.tensors import dtype_name, parse_dtype
from split_device.joining import Joined, Member
from split_device.remote import RemoteBody, Traits, is_windowed
from split_device.sessions.client import Client
from split_device.sessions.connection import Connection

#: What `generate` may be told of the cache: a session is a layer of a dynamic one.
_DYNAMIC = (None, "dynamic", "dynamic_full")


class SplitModelForCausalLM(Joined):
    """A causal language model of transformers with its body on a worker. Made by `from_pretrained`.

    The object is an instance of the checkpoint's own model class as well: `generate`, `forward` and the tokenizer
    are used as ever. Close it (or use it as a context manager) to leave the queue.
    """

    config: Any
    generation_config: Any
    _stack: Stack

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        connection: Connection | None = None,
        head_layers: int = END_LAYERS,
        tail_layers: int = END_LAYERS,
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        **fields: Any,
    ) -> Any:
        """Loads the head and the tail, and joins the queue.

        Args:
            name_or_path: a directory or hub id of a safetensors checkpoint.
            connection: how the workers are reached, and how long to wait for them.
            head_layers: decoder layers before the body, from 0.
            tail_layers: decoder layers after the body, from 0.
            dtype: of parameters and hidden states: "auto" (the checkpoint's), "float32", "bfloat16", "float16".
            revision: branch, tag or commit of a hub id.
            fields: instead of the connection's: `broker`, `keys`, `member`, `timeout`, `patience`,
                `step_timeout` and `history_memory` (see `Connection`).

        Returns:
            An instance of `SplitModelForCausalLM` and of the checkpoint's own class.

        Raises:
            UnknownModel, UnsupportedArchitecture, InvalidSplit, MissingTensor, TensorMismatch: of the model.
            KeysError, ConfigError: of the fleet or an argument.
            BrokerUnreachable: the broker did not answer in time.
        """
        connection = Connection.of(connection, fields)
        device = Member.find(connection.broker, connection.keys, connection.member)
        plan_ = plan(str(name_or_path), revision)
        split = Split.from_head_tail(plan_.layers, head_layers, tail_layers)
        manifest = find_manifest(device.fleet, plan_.checkpoint, plan_.own_tensors(split, "device"))
        model, stack = load_part(plan_, split, "device", dtype=parse_dtype(dtype), bases=(cls,), fill=RemoteBody)
        model.name_or_path = model.config.name_or_path = str(name_or_path)
        model.generation_config = generation_config(plan_) or model.generation_config
        client = device.join(
            manifest,
            split,
            dtype_name(model.dtype),
            timeout=connection.timeout,
            patience=connection.patience,
            history_memory=connection.history_memory,
            step_timeout=connection.step_timeout,
        )
        model._join(client, stack, split)
        return model

    def _join(self, client: Client, stack: Stack, split: Split) -> None:
        self._belong(client, split)
        self._stack = stack
        windowed = is_windowed(self.config.get_text_config(decoder=True), split.body)
        traits = Traits(windowed or not stack.takes_positions, stack.positions_interact)
        self._body.attach(client, split, traits)
        self._max_positions = stack.max_positions
        self._called = 0.0
        #: When the step before this one of the same `generate` ended.
        self._returned: float | None = None
        self.generation_config.cache_implementation = None
        stack.owner.register_forward_pre_hook(self._before_stack, with_kwargs=True)
        model: Any = self
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)

    @property
    def _body(self) -> RemoteBody:
        body = self._stack.slots[self.split.first]
        assert isinstance(body, RemoteBody)
        return body

    # --- what is refused by name ---------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Like transformers'. Raises UnsupportedFeature, before anything is sent, for what cannot be split."""
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        for options in (vars(config) if config is not None else {}, kwargs):
            if options.get("cache_implementation") not in _DYNAMIC:
                name = options["cache_implementation"]
                raise UnsupportedFeature(f"cache_implementation={name!r} cannot be split: only a dynamic cache can")
            _refuse_outputs(options)
        for name in ("cache", "past_key_values"):
            if kwargs.get(name) is not None:
                self._body.check_cache(kwargs[name])
        inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if isinstance(inputs, torch.Tensor) and inputs.ndim == 2:
            self._check_length(inputs.shape[1])
        self._returned = None
        call = self._body.call
        call.made = [] if all(kwargs.get(name) is None for name in ("cache", "past_key_values")) else None
        try:
            output = super().generate(*args, **kwargs)  # type: ignore[misc]
            # Nobody can use its cache any more: the worker need not wait for the garbage collector.
            for session in (call.made or []) if isinstance(output, torch.Tensor) else []:
                session.reset()
            return output
        finally:
            self._returned = call.made = None

    def generate_batch(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refused: transformers' continuous batching keeps a paged cache of all layers in this process."""
        raise UnsupportedFeature("generate_batch cannot be split: use generate, the worker batches by itself")

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def save_pretrained(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refused: this process holds a part of the model only."""
        raise UnsupportedFeature("a split model holds only its head and tail; save the original checkpoint")

    def _check_length(self, tokens: int) -> None:
        if tokens > self._max_positions:
            raise PromptTooLong(f"{tokens} tokens exceed the model's {self._max_positions} positions")

    # --- hooks ---------------------------------------------------------------------------------------------

    def _before_forward(self, _module: Any, _args: Any) -> None:
        self._called = time.perf_counter()
        if self._returned is not None:
            self.timings.add("sampling", self._called - self._returned)

    def _before_stack(self, _owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        config = self.config
        _refuse_outputs({name: getattr(config, name, False) for name in _OUTPUTS} | kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None and not isinstance(mask, torch.Tensor):
            raise UnsupportedFeature("prepared attention masks cannot be split: pass a 2-D attention_mask")
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is not None:
            self._body.check_cache(cache)
        states = kwargs.get("inputs_embeds")
        tokens = kwargs.get("input_ids", args[0] if args else None) if states is None else states
        if tokens is not None:
            self._check_length((cache.get_seq_length() if cache is not None else 0) + tokens.shape[1])
        self._body.call.mask = mask
        self._body.call.positions = kwargs.get("position_ids")

    def _after_forward(self, _module: Any, _args: Any, _output: Any) -> None:
        self._returned = time.perf_counter()
        timings = self.timings
        timings.steps += 1
        timings.add("head", self._body.entered - self._called)
        timings.add("tail", self._returned - self._body.left)


_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


def _refuse_outputs(options: dict[str, Any]) -> None:
    for name in _OUTPUTS:
        if options.get(name):
            raise UnsupportedFeature(f"{name} cannot be split: the body's are on the worker")

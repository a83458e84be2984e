"""`SplitModelForCausalLM`: a language model whose middle layers run on a worker."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from split_common.compat.transformers import (
    attention_implementation,
    declare_croppable,
    install_capturing_hooks,
)
from split_common.errors import ConfigError, PromptTooLong, UnsupportedFeature
from split_common.models.cache_layers import cached_tokens, was_used
from split_common.models.codecs import CODECS, EXACT
from split_common.models.demo_model import model_option
from split_common.models.layer_stack import LayerStack
from split_common.models.loading import ModelSpec, generation_config, load_part, read_spec
from split_common.models.split import END_LAYERS, Split
from split_common.models.tensors import dtype_name, parse_dtype, to_bytes, usual_states
from split_common.models.verification import find_manifest
from split_common.protocol import payloads
from split_device.models.adapters import AdapterDirectories, ModelAdapters, WithAdapters, adapter_directories
from split_device.models.additions import check_additions
from split_device.models.assisted import check_assisted
from split_device.models.body import Generating, RemoteBody, RemoteLayer, forwarding, generating
from split_device.models.compression import known_codec
from split_device.models.connected import ConnectedModel, Endpoint
from split_device.models.fused_ends import fuse_ends
from split_device.models.masks import plain_mask
from split_device.models.outputs import PARTIAL, REFUSED, logits_to_keep, refuse_outputs
from split_device.models.prepared import StepContext
from split_device.models.traits import Traits, attends, has_states_outside, sees_gaps
from split_device.sessions.client import Client
from split_device.sessions.connection import Connection
from split_device.sessions.identity import check_request_id
from split_device.sessions.timings import StepTimings

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _OwnClass
else:
    # The checkpoint's own class is mixed in when a model is loaded.
    _OwnClass = object

#: Values of `cache_implementation` that can be split: a session is a layer of a dynamic cache.
_DYNAMIC = (None, "dynamic", "dynamic_full")


@dataclass(frozen=True)
class SplitParts:
    """The parts of a split language model, for code that runs its layers by itself."""

    client: Client
    split: Split
    stack: LayerStack
    traits: Traits
    adapters: ModelAdapters
    #: Most positions of a sequence.
    max_positions: int
    #: Bytes of each session's history that stay in memory.
    history_memory: int


class SplitModelForCausalLM(ConnectedModel, WithAdapters, _OwnClass):  # type: ignore[misc]
    """A causal language model of transformers with its body on a worker. Made by `from_pretrained`.

    The object is also an instance of the checkpoint's own model class: use `generate`, `forward` and the tokenizer
    as usual. Close it, or use it as a context manager, to leave the queue.
    """

    split_parts: SplitParts
    #: Branch, tag or commit of the hub id that it was loaded by; None for the default one, or a directory.
    revision: str | None = None

    #: Whether the checkpoint's class must be one that takes images.
    _takes_images = False

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
        adapter: AdapterDirectories | None = None,
        codec: str = EXACT,
        **fields: Any,
    ) -> Self:
        """Loads the head and the tail, and joins the queue.

        Args:
            name_or_path: a directory or hub id of a safetensors checkpoint, or a GGUF file.
            connection: how the workers are reached, and how long to wait for them.
            head_layers: decoder layers before the body, from 0.
            tail_layers: decoder layers after the body, from 0.
            dtype: of parameters and hidden states: "auto" (the checkpoint's), "float32", "bfloat16", "float16".
            revision: branch, tag or commit of a hub id.
            adapter: the directory of a LoRA in PEFT's format, which is active then; or several directories by
                name, of which `set_adapter` makes one active. Workers need the same.
            codec: how hidden states travel: "exact" (as they are), "lossless" (in fewer bytes, with the same bits),
                "int8" or "int4" (rounded, with a scale for each group of channels). Answers are token-identical
                with the first two only.
            fields: instead of the connection's: `broker`, `keys`, `member`, `timeout`, `patience`,
                `step_timeout`, `history_memory` and `pad_steps` (see `Connection`).

        Returns:
            An instance of `SplitModelForCausalLM` and of the checkpoint's own class.

        Raises:
            UnknownModel, UnsupportedArchitecture, InvalidSplit, MissingTensor, TensorMismatch: the model cannot be
                loaded or split like this.
            UnsupportedFeature: an adapter, or a default for `generate`, does not run split.
            KeysError: the fleet's keys are missing or invalid, or no manifest lists the model or an adapter.
            ConfigError: an argument is invalid.
            BrokerUnreachable: the broker did not answer in time.
        """
        encoding = CODECS[known_codec(codec, CODECS)]
        connection = Connection.of(connection, fields)
        device = Endpoint.find(connection)
        spec = read_spec(str(name_or_path), revision, images=cls._takes_images)
        split = Split.from_head_tail(spec.layers, head_layers, tail_layers)
        manifest = find_manifest(device.fleet, spec.checkpoint, spec.own_tensors(split, "device"))
        model, stack = cls._load(spec, split, parse_dtype(dtype))
        model.name_or_path = model.config.name_or_path = str(name_or_path)
        model.revision = revision
        adapters = ModelAdapters(device.fleet, manifest)
        if adapter is not None:
            adapters.load(model, stack, split, adapter_directories(adapter))
            adapters.chosen.number = None if isinstance(adapter, Mapping) else 0
        options = f"{model_option(str(name_or_path))} --layers {split.first}:{split.last}{adapters.worker_options}"
        client = device.join(manifest, split, dtype_name(model.dtype), options, encoding)
        model._join(client, stack, split, adapters, connection.history_memory)
        return model

    @classmethod
    def _load(cls, spec: ModelSpec, split: Split, dtype: torch.dtype | None) -> tuple[Self, LayerStack]:
        """The head and the tail, with placeholders between them; they have no client yet."""
        model: Self
        model, stack = load_part(
            spec,
            split,
            "device",
            dtype=dtype,
            bases=(cls,),
            fill=lambda index: RemoteBody() if index == split.first else RemoteLayer(),
        )
        model.generation_config = generation_config(spec.checkpoint)
        return model, stack

    def _join(
        self, client: Client, stack: LayerStack, split: Split, adapters: ModelAdapters, history_memory: int
    ) -> None:
        self._set_client(client, split)
        config = self.config.get_text_config(decoder=True)
        counts_indices = sees_gaps(config, split.body) or not stack.takes_positions
        axes = stack.position_axes if self.config is not config else None
        traits = Traits(counts_indices, stack.positions_interact, attends(config), axes)
        if not has_states_outside(config, split.body):
            declare_croppable(self)
        self.split_parts = SplitParts(client, split, stack, traits, adapters, stack.max_positions, history_memory)
        self._body.attach(client, split, traits, history_memory, adapters)
        last = stack.slots[split.last - 1]
        for name, slot in self.named_modules():
            if isinstance(slot, RemoteLayer):
                slot.close_off(name, stack.owner, slot is last)
        #: Names of the positional arguments of the stack's owner, and of the model itself, in order.
        _, *self._stack_arguments = inspect.signature(inspect.unwrap(type(stack.owner).forward)).parameters
        _, *self._arguments = inspect.signature(inspect.unwrap(type(self).forward)).parameters
        #: Computes head and tail on the CPU; None if their own code does.
        self.fused_ends = fuse_ends(self, stack, split) if axes is None else None
        self.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self.register_forward_hook(self._after_forward, always_call=True)
        stack.owner.register_forward_pre_hook(self._before_stack, with_kwargs=True)
        stack.owner.register_forward_hook(self._after_stack, always_call=True)

    def warm_up(self) -> None:
        """Has a channel to a worker set up in the background, and again whenever there is none.

        A request then needs one round trip to its first token, not three. If no worker can be found, the first
        request says so.

        Raises:
            ForkedProcess: this process was forked since the model was loaded.
        """
        states = usual_states(self.split_parts.stack.width, self.dtype)
        step = payloads.Step(dtype_name(self.dtype), len(states), [payloads.Run(0, 0, [0])])
        self._client.warm_up(step, to_bytes(states[None]))

    @property
    def _body(self) -> RemoteBody:
        body = self.split_parts.stack.slots[self.split.first]
        assert isinstance(body, RemoteBody)
        return body

    # --- what is refused by name ---------------------------------------------------------------------------

    def generate(self, *args: Any, request_id: str | None = None, **kwargs: Any) -> Any:
        """Works like transformers' `generate`.

        Args:
            request_id: the id by which logs name the call, 1 to 128 visible ASCII characters; None for a random
                one. A cache that an earlier call has filled keeps the id of that call.

        Raises:
            UnsupportedFeature: an argument does not run split; nothing was sent.
            PromptTooLong: the prompt exceeds the model's positions.
            ConfigError: a token of the prompt is not one of the model's, or the request id is not one.
            SplitError: the worker or the queue failed.
        """
        self.check_process()
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        room = self._check_options(config, kwargs)
        for name in ("cache", "past_key_values"):
            if (cache := kwargs.get(name)) is not None:
                self._body.check_cache(cache)
                if not self.split_parts.traits.attends and was_used(cache):
                    raise UnsupportedFeature(
                        "generate cannot continue a cache of states alone, because transformers does not know how "
                        "many tokens it holds: pass the whole text without a cache"
                    )
        inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if isinstance(inputs, torch.Tensor) and inputs.ndim == 2:
            self._check_length(inputs.shape[1])
            check_tokens(self, inputs)
        own_cache = all(kwargs.get(name) is None for name in ("cache", "past_key_values"))
        if request_id is not None:
            check_request_id(request_id)
        with generating.entered(Generating(self._body, request_id=request_id, room=room)) as scope:
            output = super().generate(*args, **kwargs)
        if own_cache and isinstance(output, torch.Tensor):
            # Its cache is gone, so the worker need not keep the session until the garbage collector runs.
            for session in scope.sessions:
                session.reset()
        return output

    def generate_batch(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refused: transformers' continuous batching has a paged cache of all layers in this process."""
        raise UnsupportedFeature("generate_batch does not run split: use generate; the worker batches by itself")

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def _check_options(self, config: Any, kwargs: dict[str, Any]) -> int:
        """As `check_assisted`. Raises UnsupportedFeature for what a call of `generate`, or a default, asks for."""
        options: dict[str, Any] = {}
        for given in (vars(self.generation_config), vars(config) if config is not None else {}, kwargs):
            options |= {name: value for name, value in given.items() if value is not None}
        if (name := options.get("cache_implementation")) not in _DYNAMIC:
            raise UnsupportedFeature(f"cache_implementation={name!r} does not run split: use a dynamic cache")
        room = check_assisted(self, options)
        self._check_outputs(options)
        return room

    def _check_length(self, tokens: int) -> None:
        if tokens > (limit := self.split_parts.max_positions):
            raise PromptTooLong(f"{tokens} tokens exceed the model's {limit} positions")

    def _check_outputs(self, options: dict[str, Any]) -> None:
        """Has transformers capture the outputs of single layers that a call asks for. Raises UnsupportedFeature."""
        stack = self.split_parts.stack
        refuse_outputs(options, self._body.captured, eager=attention_implementation(stack.owner) == "eager")
        if any(options.get(name) for name in PARTIAL):
            self.install_captures()

    def install_captures(self) -> None:
        """Has transformers capture outputs of the device's layers, but not of stand-ins, where asked for."""
        with contextlib.ExitStack() as without:
            for slot in self.split_parts.stack.slots[self.split.first : self.split.last]:
                assert isinstance(slot, RemoteLayer)
                without.enter_context(slot.without_stand_ins())
            install_capturing_hooks(self)

    # --- hooks; the `_after` hooks run after a failed call, too --------------------------------------------

    @property
    def _scope(self) -> Generating | None:
        """The call of `generate` of this model that is under way on this thread."""
        scope = generating.get()
        return scope if scope is not None and scope.body is self._body else None

    def _before_forward(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.check_process()
        # A model around the owner may install hooks of its own before the owner is called.
        self._check_outputs({name: kwargs.get(name) for name in PARTIAL})
        scope = self._scope
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        mask = given.get("attention_mask")
        # Layers of the tail need what all tokens bring, and so do models that ignore the argument.
        needs_all = self.split.last < self.split.layers or "logits_to_keep" not in self._arguments
        last = None if needs_all else logits_to_keep(given)
        context = StepContext(
            mask if isinstance(mask, torch.Tensor) else None,
            last=last,
            room=scope.step_room if scope is not None else None,
            timings=StepTimings(scope.step_ended if scope is not None else None),
        )
        context.timings.lap("sampling")
        forwarding.enter(context)

    def _before_stack(self, _owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.check_process()
        given = dict(zip(self._stack_arguments, args, strict=False)) | kwargs
        cache = given.get(self.split_parts.stack.cache_name)
        # The owner may have been called without the model around it.
        around = forwarding.get() or StepContext()
        places = given.get("position_ids")
        context = StepContext(positions=places, last=around.last, room=around.room, timings=around.timings)
        forwarding.enter(context)
        self._check_outputs({name: getattr(self.config, name, False) for name in (*PARTIAL, *REFUSED)} | given)
        if cache is not None:
            self._body.check_cache(cache)
            context.head_states = self._body.head_states(cache)
        context.mask, context.ahead = plain_mask(self.config, given, cache, around.mask)
        if context.ahead is not None and self.split_parts.traits.axes is None:
            raise UnsupportedFeature("attention to later tokens is supported only in models that take images")
        check_additions(self.split_parts.stack, self.split, given)
        states = given.get("inputs_embeds")
        tokens = given.get("input_ids") if states is None else states
        if tokens is not None:
            uses_cache = given.get("use_cache")
            if cache is None and not (
                getattr(self.config, "use_cache", True) if uses_cache is None else uses_cache
            ):
                _refuse_packing(context)
            self._check_length((cached_tokens(cache) if cache is not None else 0) + tokens.shape[1])
        if states is None and tokens is not None and self._scope is None:
            check_tokens(self, tokens)

    def _after_stack(self, _owner: Any, _args: Any, _output: Any) -> None:
        if (context := forwarding.get()) is not None:
            forwarding.leave(context)

    def _after_forward(self, _module: Any, _args: Any, output: Any) -> None:
        context = forwarding.get()
        if context is None:
            return
        forwarding.leave(context)
        if output is None:
            # The forward failed.
            return
        context.timings.lap("tail")
        self.timings.record(context.timings)
        if (scope := self._scope) is not None:
            scope.step_ended = context.timings.since


class SplitModelForImageTextToText(SplitModelForCausalLM):
    """A model of transformers for images and text, of `AutoModelForImageTextToText`, with its body on a worker.

    The device sees the images: what travels is hidden states, the positions of their tokens, and which tokens
    attend to those after them. Made by `from_pretrained`; the checkpoint's `AutoProcessor` makes the inputs.
    """

    _takes_images = True


def check_tokens(model: Any, tokens: torch.Tensor | Iterable[int]) -> None:
    """Raises ConfigError if a token id has no embedding. They may be a tensor in any shape, or of any size."""
    known = len(model.get_input_embeddings().weight)
    if isinstance(tokens, torch.Tensor):
        tokens = tokens[(tokens < 0) | (tokens >= known)].tolist()
    strange = next((token for token in tokens if not 0 <= token < known), None)
    if strange is not None:
        raise ConfigError(
            f"token {strange} is not among the model's {known}: if its tokenizer was given more tokens, "
            "the checkpoint needs their embeddings, too (resize_token_embeddings, save_pretrained)"
        )


def _refuse_packing(context: StepContext) -> None:
    """Raises UnsupportedFeature for several sequences in one row, which transformers tells by their positions."""
    positions = context.positions
    if context.mask is not None or positions is None:
        return
    # Of several axes, the first one grows, and stays the same within an image.
    steps = positions.diff() if positions.ndim == 2 else positions[0].diff().clamp(max=0) + 1
    if bool((steps != 1).any()):
        raise UnsupportedFeature("packed sequences do not run split: pass them as rows of a batch")

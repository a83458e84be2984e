"""The body's place in the device's model: its first slot sends hidden states to a worker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from split_common.compat.transformers import active_captures, captured_outputs
from split_common.errors import UnsupportedFeature
from split_common.models.cache_layers import States, copy_states, crop_keys, has_states, restore_states, was_used
from split_common.models.layer_stack import PassThrough
from split_common.models.split import Split
from split_device.models.adapters import ModelAdapters
from split_device.models.body_layer import BodyLayer
from split_device.models.cache import SessionCacheLayer
from split_device.models.connected import refuse_gradients
from split_device.models.context import CallContext
from split_device.models.outputs import record
from split_device.models.prepared import StepContext
from split_device.models.stand_ins import OnWorker, outline
from split_device.models.traits import Traits
from split_device.sessions.client import Client


@dataclass
class Generating:
    """A call of `generate` that is under way."""

    body: RemoteBody
    #: The sessions opened by it.
    sessions: list[SessionCacheLayer] = field(default_factory=list)
    #: The id of the request that the sessions belong to; None for a random one each.
    request_id: str | None = None
    #: The tokens of a row for which each of its decoding steps has room.
    room: int = 1
    #: When its last step ended, by `time.perf_counter`; None before the first step.
    step_ended: float | None = None

    @property
    def step_room(self) -> int | None:
        """`StepContext.room` of its next step; that of the prompt is as large as the prompt."""
        return None if self.step_ended is None else self.room


#: The forward that is under way.
forwarding: CallContext[StepContext] = CallContext("forward")

#: The call of `generate` that is under way.
generating: CallContext[Generating] = CallContext("generate")


class RemoteLayer(OnWorker, PassThrough):
    """The layer in a slot of the body. `close_off` gives it stand-ins for the modules of the original layer."""

    _index = 0
    #: Whether it is the body's last one.
    _is_last = False
    #: How many outputs transformers captures in the original layer, by name.
    captured: Mapping[str, int] = {}

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The body's first slot has returned the output of the last one, which is passed on.
        record(self._index, self.captured, hidden, hidden if self._is_last else None)
        return self.wrap(hidden)

    def imitate(self, layer: nn.Module) -> None:
        super().imitate(layer)
        # Not as a submodule: its weights are not loaded.
        self.__dict__["_original"] = layer

    def close_off(self, name: str, owner: nn.Module, is_last: bool) -> None:
        """Refuses changes from now on.

        Args:
            name: the layer's in the model; it ends with the layer's index.
            owner: calls the layers.
            is_last: whether it is the body's last one.
        """
        original = self.__dict__.pop("_original")
        self._index, self._is_last = int(name.rpartition(".")[2]), is_last
        self.captured = captured_outputs(owner, original, name)
        outline(self, original)
        self.seal(name)

    @contextlib.contextmanager
    def without_stand_ins(self) -> Iterator[None]:
        """Hides the stand-ins from code that registers hooks on all modules of their classes."""
        modules = self.__dict__["_modules"]
        self.__dict__["_modules"] = {}
        try:
            yield
        finally:
            self.__dict__["_modules"] = modules


class RemoteBody(RemoteLayer):
    """The layer in the body's first slot. Refuses what does not run split, by name, before anything is sent."""

    def attach(
        self, client: Client, split: Split, traits: Traits, history_memory: int, adapters: ModelAdapters
    ) -> None:
        """Sets what a forward needs.

        Args:
            client: opens sessions.
            split, traits: the body's layers, and what they are like.
            history_memory: bytes of each session's history that stay in memory.
            adapters: the model's, of which new sessions have the active one.
        """
        self._client = client
        self._split = split
        self._traits = traits
        self._history_memory = history_memory
        self._adapters = adapters

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        context = forwarding.get() or StepContext()
        context.timings.lap("head")
        refuse_gradients(hidden)
        if active_captures():
            # Hidden states of all tokens are asked for.
            context.last = None
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        with self._session(cache, context, hidden.shape[1]) as session:
            step = session.prepare(hidden, context)
            output = session.exchange(step)
            output = session.commit(step, output)
        context.timings.start_lap()
        record(self._index, self.captured, hidden, output if self._is_last else None)
        return self.wrap(output)

    def check_cache(self, cache: Any) -> None:
        """Raises UnsupportedFeature for a cache that cannot have a session as a layer."""
        if type(cache) is not DynamicCache:
            raise UnsupportedFeature(f"a {type(cache).__name__} does not run split: use a DynamicCache")
        if getattr(cache, "offloading", False):
            raise UnsupportedFeature("an offloaded cache does not run split: use a plain DynamicCache")
        session = next((layer for layer in cache.layers if isinstance(layer, SessionCacheLayer)), None)
        if session is None:
            if was_used(cache):
                raise UnsupportedFeature("a cache that was filled by an unsplit model cannot be continued here")
        elif session.client is not self._client or session is not cache.layers[self._split.first]:
            raise UnsupportedFeature("a cache that was filled by another split model cannot be continued here")
        elif session.adapter != self._adapters.active_request:
            raise UnsupportedFeature(
                "a cache cannot be continued with another adapter than it was begun with: its keys and values are "
                "that adapter's"
            )

    @contextlib.contextmanager
    def _session(self, cache: Cache | None, context: StepContext, tokens: int) -> Iterator[SessionCacheLayer]:
        """The session for a forward of `tokens` new tokens: the cache's, or one for this block without a cache."""
        if cache is None:
            session = self._new_session(None)
            try:
                yield session
            finally:
                session.reset()
            return
        try:
            yield self._session_of(cache)
        except BaseException:
            self._roll_back_head(cache, tokens, context.head_states)
            raise

    def _session_of(self, cache: Cache) -> SessionCacheLayer:
        """The cache's session. If there is none, creates it in place of the body's layers."""
        split = self._split
        cache.layers += [DynamicLayer() for _ in range(split.layers - len(cache.layers))]
        session = cache.layers[split.first]
        if not isinstance(session, SessionCacheLayer):
            windows = [getattr(cache.layers[index], "sliding_window", None) for index in split.body]
            scope = generating.get()
            if scope is None or scope.body is not self:
                session = self._new_session(windows[0])
            else:
                session = self._new_session(windows[0], scope.request_id)
                scope.sessions.append(session)
            others = [BodyLayer(session, window) for window in windows[1:]]
            cache.layers[split.first : split.last] = [session, *others]
        return session

    def _new_session(self, window: int | None, request_id: str | None = None) -> SessionCacheLayer:
        return SessionCacheLayer(
            self._client,
            self._traits,
            window,
            self._history_memory,
            request_id,
            adapter=self._adapters.active_request,
        )

    def head_states(self, cache: Cache) -> dict[int, States]:
        """Copies of the states in the head's cache layers, by the layer's index."""
        head = enumerate(cache.layers[: self._split.first])
        return {index: copy_states(layer) for index, layer in head if has_states(layer)}

    def _roll_back_head(self, cache: Cache, tokens: int, states: dict[int, States]) -> None:
        """Removes a failed step from the cache layers of the head, so that it can be tried again.

        Args:
            tokens: number of the step's tokens.
            states: the states before it, see `head_states`.
        """
        for index, layer in enumerate(cache.layers[: self._split.first]):
            if index in states:
                restore_states(layer, states[index])
            # A sliding window that has dropped tokens cannot be rolled back; its cache cannot be used again.
            with contextlib.suppress(RuntimeError):
                crop_keys(layer, tokens)

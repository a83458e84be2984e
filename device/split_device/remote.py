"""The body's place in the device's model: what goes into slot `first` comes back from a worker.

A session is a layer of transformers' own cache, so that `generate` crops, reorders and copies it like any other.
Such changes cost no message: they travel with the next step.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from split_common import payloads
from split_common.errors import Busy, SessionLost, UnsupportedFeature
from split_common.slots import PassThrough
from split_common.split import Split
from split_common.tensors import dtype_name, raw_bytes, to_bytes
from split_device.sessions.chunks import Request, cut
from split_device.sessions.client import Client
from split_device.sessions.history import History
from split_device.sessions.lasting import Lasting
from split_device.sessions.session import RemoteSession

#: Bytes of hidden states in one message; a longer prefill travels in several.
CHUNK_BYTES = 1024 * 1024

#: Chunks of history that are under way to a new worker at once.
REPLAY_WINDOW = 8


class Call(threading.local):
    """What the model was called with: seen by a hook on the stack's owner, used in the body's slot."""

    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    #: The sessions that the `generate` under way has made; None outside of it.
    made: list[SessionLayer] | None = None


@dataclass(frozen=True)
class Traits:
    """What the device must know of the body's layers, which it does not have."""

    #: Some may count the cache's indices and not the tokens' positions: those with sliding windows, or with no
    #: position ids.
    counts_indices: bool
    #: What a token is handed depends on the largest position of the call.
    positions_interact: bool


class BodyLayer(DynamicLayer):  # type: ignore[misc]
    """The cache layer of a slot of the body: as long and as wide as the unsplit model's, and empty.

    Args:
        session: holds the keys and values; None where this is the session itself.
        window: the sliding window's size in tokens; None without one.
    """

    def __init__(self, session: SessionLayer | None, window: int | None) -> None:
        super().__init__()
        self.is_initialized = True
        self.is_sliding = window is not None
        self._window = window
        self._session = session

    def get_seq_length(self) -> int:
        return self._session.get_seq_length() if self._session is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length = self.get_seq_length()
        hidden = 0 if self._window is None else max(0, length - self._window + 1)
        return length - hidden + query_length, hidden

    def get_max_length(self) -> int:
        return -1 if self._window is None else self._window

    get_max_cache_shape = get_max_length

    def update(self, *_args: Any, **_kwargs: Any) -> Any:
        raise UnsupportedFeature("the body's keys and values are on the worker")

    def offload(self) -> None:
        raise UnsupportedFeature("an offloaded cache cannot be split: the body's keys and values are on the worker")

    def _nothing_here(self, *_args: Any) -> None:
        """Done by the session's layer, for the whole body."""

    reset = crop = reorder_cache = batch_select_indices = batch_repeat_interleave = _nothing_here


class SessionLayer(Lasting[Request], BodyLayer):
    """The body's KV cache, on a worker: the cache layer in the body's first slot.

    Args:
        client: opens the session when the first step is sent.
        traits: of the body.
        window: of the first slot, see `BodyLayer`.
        history_memory: bytes of history that stay in memory; None takes the client's.
    """

    def __init__(
        self, client: Client, traits: Traits, window: int | None = None, history_memory: int | None = None
    ) -> None:
        BodyLayer.__init__(self, None, window)
        Lasting.__init__(self, client)
        self._history_memory = client.history_memory if history_memory is None else history_memory
        self._traits = traits
        #: Which columns hold tokens and not padding, bool `[batch, columns]`; None before the first step.
        self._columns: torch.Tensor | None = None
        #: The worker's row of each row, where rows moved since the last step.
        self._select: list[int] | None = None
        self._history = History(self._history_memory)

    # --- what transformers asks of a cache layer -----------------------------------------------------------

    def get_seq_length(self) -> int:
        return 0 if self._columns is None else int(self._columns.shape[1])

    def crop(self, tokens: int) -> None:
        """Removes the last `-tokens` columns; a positive number is the length to keep (older transformers)."""
        if self._columns is not None:
            self._columns = self._columns[:, : tokens if tokens > 0 else max(0, self.get_seq_length() + tokens)]
            self._history.crop(self._columns.shape[1])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = torch.arange(0 if self._columns is None else len(self._columns))
        self._take(rows[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        count = 0 if self._columns is None else len(self._columns)
        self._take([row for row in range(count) for _ in range(repeats)])

    def reset(self) -> None:
        self._close()
        self._columns = self._select = None
        self._history = History(self._history_memory)

    def __deepcopy__(self, memo: dict[int, Any]) -> SessionLayer:
        twin = SessionLayer(self.client, self._traits, self._window, self._history_memory)
        memo[id(self)] = twin
        twin._columns = None if self._columns is None else self._columns.clone()
        twin._select = None if self._select is None else list(self._select)
        twin._history = self._history.clone()
        if self._remote is not None:
            # A copy that cannot be had from the worker is made anew with its next step.
            with contextlib.suppress(SessionLost, Busy):
                twin._hold(self._remote.fork(twin._number, next(twin._epochs)))
        return twin

    def _take(self, rows: list[int]) -> None:
        if self._columns is None:
            return
        self._columns = self._columns[rows]
        self._select = rows if self._select is None else [self._select[row] for row in rows]
        self._history.select(rows)

    # --- a step --------------------------------------------------------------------------------------------

    def step(self, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Runs the body over hidden states `[batch, tokens, width]`; padding neither travels nor comes back.

        Raises:
            UnsupportedFeature: the mask cannot be expressed as a KV cache.
            NonFinite: the states hold NaN or infinity.
            SplitError: the worker or the queue failed.
        """
        batch, tokens, width = hidden.shape
        cached, keep = self._masked(batch, tokens, call.mask)
        starts = cached.sum(1).tolist()
        positions = self._positions(batch, tokens, call.positions)
        sent, copies = self._distinct(hidden, keep, positions)
        rows = [
            payloads.Run(index, starts[row], positions[row][keep[row]].tolist())
            for index, row in enumerate(sent)
            if keep[row].any()
        ]
        packed = hidden[sent][keep[sent]]
        result = hidden.new_zeros(len(sent), tokens, width)
        if rows:
            horizon = int(positions.max()) if self._traits.positions_interact else None
            result[keep[sent]] = self._exchange(rows, packed, horizon)
        if len(sent) < batch:
            result, self._select = result[copies], copies
        self._columns = torch.cat([cached, keep], 1)
        self._history.append(hidden, positions)
        return result

    def _masked(self, batch: int, tokens: int, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Which columns are cached, and which of the new ones are tokens: both bool `[batch, …]`."""
        cached = self._columns if self._columns is not None else torch.ones(batch, 0, dtype=torch.bool)
        if len(cached) != batch:
            raise UnsupportedFeature(f"the cache has {len(cached)} rows, the batch has {batch}")
        past = cached.shape[1]
        if mask is None:
            full = torch.ones(batch, past + tokens, dtype=torch.bool)
        elif mask.ndim != 2 or tuple(mask.shape) != (batch, past + tokens):
            raise UnsupportedFeature(
                f"an attention mask of shape {tuple(mask.shape)} cannot be split: it must be 2-D, "
                f"[{batch}, {past + tokens}] (batch, cached and new tokens)"
            )
        else:
            full = mask.to("cpu", torch.bool)
        if not torch.equal(full[:, :past], cached):
            raise UnsupportedFeature(
                "the attention mask hides or reveals tokens that are already cached, e.g. a pad token that was "
                "generated in an earlier turn: pass an attention_mask that keeps them as they were"
            )
        if self._traits.counts_indices:
            before = full.cummax(1).values & ~full
            if bool((before.cummax(1).values & full)[:, past:].any()):
                raise UnsupportedFeature(
                    "padding between tokens cannot be split with layers that count cache indices (sliding windows)"
                )
        return cached, full[:, past:]

    def _positions(self, batch: int, tokens: int, positions: torch.Tensor | None) -> torch.Tensor:
        if positions is None:
            past = self.get_seq_length()
            positions = torch.arange(past, past + tokens)[None]
        if positions.ndim != 2:
            raise UnsupportedFeature(f"position ids of shape {tuple(positions.shape)} cannot be split: not 2-D")
        return positions.cpu().expand(batch, tokens)

    def _distinct(
        self, hidden: torch.Tensor, keep: torch.Tensor, positions: torch.Tensor
    ) -> tuple[list[int], list[int]]:
        """The rows to send, and which of these each row is a copy of.

        At a session's start equal rows travel once, and the worker forks them: beams, and returned sequences.
        """
        everyone = list(range(len(hidden)))
        if self._columns is not None or len(hidden) == 1:
            return everyone, everyone
        seen: dict[tuple[bytes, ...], int] = {}
        sent: list[int] = []
        copies: list[int] = []
        for row in everyone:
            mine = keep[row]
            key = tuple(bytes(raw_bytes(tensor)) for tensor in (mine, positions[row][mine], hidden[row][mine]))
            if key not in seen:
                seen[key] = len(sent)
                sent.append(row)
            copies.append(seen[key])
        return sent, copies

    def _exchange(self, rows: list[payloads.Run], packed: torch.Tensor, horizon: int | None) -> torch.Tensor:
        """Sends runs of tokens and their states `[tokens, width]`; waits while workers are full."""
        requests = self._requests(rows, packed, horizon)
        replies = self._persist(requests)
        self._select = None
        with self.client.timings.measure("decode"):
            parts = [chunk.output(reply, data) for (chunk, _), (reply, data) in zip(requests, replies, strict=True)]
            output = parts[0] if len(parts) == 1 else torch.cat(parts)
        return output.to(packed)

    def _requests(self, rows: list[payloads.Run], packed: torch.Tensor, horizon: int | None) -> list[Request]:
        with self.client.timings.measure("encode"):
            limit = max(1, CHUNK_BYTES // (packed.shape[1] * packed.element_size()))
            chunks = cut(rows, packed, limit, horizon)
            return [(chunk, to_bytes(chunk.states)) for chunk in chunks]

    def _letter(self, requests: list[Request]) -> tuple[int, int, int]:
        rows = len({row.row for chunk, _ in requests for row in chunk.rows})
        return rows, sum(len(chunk.states) for chunk, _ in requests), self.get_seq_length()

    def _is_spoilt(self, requests: list[Request]) -> bool:
        # Of several chunks some may have run, and with the first one the selection.
        return self._select is not None and len(requests) > 1

    def _is_new(self) -> bool:
        return not self.get_seq_length()

    def _open(self, avoid: list[bytes]) -> None:
        """Opens a session on some worker, and fills its cache with what is cached here."""
        remote = self.client.open_session(avoid, self._number, next(self._epochs), self._check)
        self._hold(remote)
        if not self.get_seq_length():
            return
        assert self._columns is not None
        self._select = None
        requests = (
            request
            for runs in self._history.replay(self._columns, self._traits.positions_interact)
            for request in self._requests(*runs)
        )
        try:
            while window := list(itertools.islice(requests, REPLAY_WINDOW)):
                self._send(remote, window)
        except BaseException:
            # It holds a part of the history only, whatever the reason.
            remote.close()
            raise
        self.client.counters["replays"] += 1

    def _send(self, remote: RemoteSession, requests: list[Request]) -> list[tuple[payloads.AnyReply, memoryview]]:
        timings = self.client.timings
        steps: list[tuple[payloads.Payload, memoryview]] = []
        for chunk, data in requests:
            select = None if steps else self._select
            dtype, width = dtype_name(chunk.states.dtype), chunk.states.shape[1]
            steps.append((payloads.Step(dtype, width, chunk.rows, select, remote.acked), data))
        with timings.measure_rest("queue"):
            replies = remote.call(steps)
            for reply, _ in replies:
                if isinstance(reply, payloads.Result):
                    timings.add("body", reply.body_us / 1e6)
                    timings.add("worker", reply.worker_us / 1e6)
        return replies


class RemoteBody(PassThrough):
    """The layer in the body's first slot. Refuses, by name and before anything is sent, what cannot be split."""

    def __init__(self) -> None:
        super().__init__()
        self.call = Call()
        #: When the slot was last entered and left, by `time.perf_counter`.
        self.entered = self.left = 0.0

    def attach(self, client: Client, split: Split, traits: Traits) -> None:
        self._client = client
        self._split = split
        #: Of the body's layers.
        self.traits = traits

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.entered = time.perf_counter()
        if hidden.requires_grad:
            raise UnsupportedFeature("gradients do not pass through the worker: use torch.no_grad()")
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is not None:
            layer = self._session_layer(cache)
            try:
                output = layer.step(hidden, self.call)
            except BaseException:
                self._take_back(cache, hidden.shape[1])
                raise
        else:
            output = self._without_cache(hidden)
        self.left = time.perf_counter()
        return self.wrap(output)

    def _without_cache(self, hidden: torch.Tensor) -> torch.Tensor:
        positions = self.call.positions
        if self.call.mask is None and positions is not None and bool((positions.diff() != 1).any()):
            raise UnsupportedFeature("packed sequences cannot be split: pass them as rows of a batch")
        layer = SessionLayer(self._client, self.traits)
        try:
            return layer.step(hidden, self.call)
        finally:
            layer.reset()

    def _take_back(self, cache: Cache, tokens: int) -> None:
        """Undoes what the head's layers have cached of a step that failed, so that it may be tried again."""
        for layer in cache.layers[: self._split.first]:
            # A sliding window that has forgotten cannot be rolled back: such a cache is of no more use.
            with contextlib.suppress(RuntimeError):
                layer.crop(-tokens)

    def check_cache(self, cache: Any) -> None:
        """Raises UnsupportedFeature for a cache that a session cannot be a layer of."""
        if type(cache) is not DynamicCache:
            raise UnsupportedFeature(f"a {type(cache).__name__} cannot be split: use a DynamicCache")
        if getattr(cache, "offloading", False):
            raise UnsupportedFeature("an offloaded cache cannot be split: use a plain DynamicCache")
        session = next((layer for layer in cache.layers if isinstance(layer, SessionLayer)), None)
        if session is None:
            if cache.get_seq_length():
                raise UnsupportedFeature("a cache that was filled by an unsplit model cannot be continued here")
        elif session.client is not self._client or session is not cache.layers[self._split.first]:
            raise UnsupportedFeature("a cache that was filled by another split model cannot be continued here")

    def _session_layer(self, cache: Cache) -> SessionLayer:
        cache.layers += [DynamicLayer() for _ in range(self._split.layers - len(cache.layers))]
        layer = cache.layers[self._split.first]
        if not isinstance(layer, SessionLayer):
            windows = [getattr(cache.layers[index], "sliding_window", None) for index in self._split.body]
            layer = SessionLayer(self._client, self.traits, windows[0])
            if self.call.made is not None:
                self.call.made.append(layer)
            cache.layers[self._split.first : self._split.last] = [
                layer,
                *(BodyLayer(layer, window) for window in windows[1:]),
            ]
        return layer


def is_windowed(config: Any, body: range) -> bool:
    """Whether any of the body's layers attends to a window of the cache only."""
    layers = DynamicCache(config=config).layers
    if any(layer.is_sliding for layer in layers):
        return any(layer.is_sliding for layer in layers[body.start : body.stop])
    # Older architectures mask a window in their layers, and their caches know nothing of it.
    names = ("window", "window_size")
    return any(isinstance(size, int) and size > 1 for name, size in vars(config).items() if name.endswith(names))

"""The body's place in the device's model: what goes into slot `first` comes back from a worker.

A session is a layer of transformers' own cache, so that `generate` crops, reorders and copies it like any other.
Such changes cost no message: they travel with the next step.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer

from split_common import wire
from split_common.errors import Busy, Malformed, UnsupportedFeature
from split_common.slots import PassThrough
from split_common.split import Split
from split_common.tensors import DTYPES, dtype_name, from_bytes, to_bytes
from split_device.client import Client, RemoteSession

#: Bytes of hidden states in one message; a longer prefill travels in several.
CHUNK_BYTES = 1024 * 1024


@dataclass
class Call:
    """What the model was called with: seen by a hook on the stack's owner, used in the body's slot."""

    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None


class SessionLayer(DynamicLayer):  # type: ignore[misc]
    """The body's KV cache, on a worker: the cache layer in the body's first slot.

    Args:
        client: opens the session when the first step is sent.
        windowed: whether the body has sliding-window layers, which count cache indices.
    """

    def __init__(self, client: Client, windowed: bool) -> None:
        super().__init__()
        self.is_initialized = True
        self._client = client
        self._windowed = windowed
        self._remote: RemoteSession | None = None
        self._columns: torch.Tensor | None = None
        self._select: list[int] | None = None

    # --- what transformers asks of a cache layer -----------------------------------------------------------

    def get_seq_length(self) -> int:
        return 0 if self._columns is None else int(self._columns.shape[1])

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        tokens = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length() + tokens, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def update(self, *_args: Any, **_kwargs: Any) -> Any:
        raise UnsupportedFeature("the body's keys and values are on the worker")

    def activate_past_recording(self) -> None:
        """Workers can always roll back."""

    def crop(self, tokens: int) -> None:
        """Removes the last `-tokens` columns; a positive number is the length to keep (older transformers)."""
        if self._columns is not None:
            self._columns = self._columns[:, : tokens if tokens > 0 else self.get_seq_length() + tokens]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = torch.arange(0 if self._columns is None else len(self._columns))
        self._take(rows[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        count = 0 if self._columns is None else len(self._columns)
        self._take([row for row in range(count) for _ in range(repeats)])

    def reset(self) -> None:
        if self._remote is not None:
            self._remote.close()
        self._remote = self._columns = self._select = None

    def offload(self) -> None:
        raise UnsupportedFeature("an offloaded cache cannot be split: the body's keys and values are on the worker")

    def __deepcopy__(self, memo: dict[int, Any]) -> SessionLayer:
        twin = SessionLayer(self._client, self._windowed)
        memo[id(self)] = twin
        twin._columns = None if self._columns is None else self._columns.clone()
        twin._select = None if self._select is None else list(self._select)
        if self._remote is not None:
            twin._hold(self._remote.fork())
        return twin

    def _take(self, rows: list[int]) -> None:
        if self._columns is None:
            return
        self._columns = self._columns[rows]
        self._select = rows if self._select is None else [self._select[row] for row in rows]

    def _hold(self, remote: RemoteSession) -> None:
        self._remote = remote
        weakref.finalize(self, remote.close)

    # --- a step --------------------------------------------------------------------------------------------

    def step(self, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Runs the body over hidden states `[batch, tokens, width]`; padding neither travels nor comes back.

        Raises:
            UnsupportedFeature: the mask cannot be expressed as a KV cache.
            SplitError: the worker or the queue failed.
        """
        batch, tokens, width = hidden.shape
        columns, keep = self._masked(batch, tokens, call.mask)
        starts = columns.sum(1).tolist()
        positions = self._positions(batch, tokens, call.positions)
        sent = self._distinct(hidden, keep)
        rows = [
            wire.Row(index, int(starts[row]), positions[row][keep[row]].tolist())
            for index, row in enumerate(sent)
            if keep[row].any()
        ]
        packed = hidden[sent][keep[sent]]
        output = self._exchange(rows, packed) if rows else packed
        result = hidden.new_zeros(batch, tokens, width)
        if len(sent) < batch:
            unpacked = hidden.new_zeros(len(sent), tokens, width)
            unpacked[keep[sent]] = output
            groups = self._groups(hidden, keep, sent)
            result = unpacked[groups]
            self._select = groups
        else:
            result[keep] = output
        self._columns = torch.cat([columns, keep], 1)
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
        if self._windowed and bool((full.long().diff(dim=1) < 0).any()):
            raise UnsupportedFeature("padding between tokens cannot be split with sliding-window layers: pad left")
        return cached, full[:, past:]

    def _positions(self, batch: int, tokens: int, positions: torch.Tensor | None) -> torch.Tensor:
        if positions is None:
            past = self.get_seq_length()
            positions = torch.arange(past, past + tokens)[None]
        if positions.ndim != 2:
            raise UnsupportedFeature(f"position ids of shape {tuple(positions.shape)} cannot be split: not 2-D")
        return positions.cpu().expand(batch, tokens)

    def _distinct(self, hidden: torch.Tensor, keep: torch.Tensor) -> list[int]:
        """Rows to send: at a session's start, equal ones travel once, and the worker forks them."""
        batch = len(hidden)
        if self._columns is not None or batch == 1:
            return list(range(batch))
        distinct: list[int] = []
        for row in range(batch):
            if not any(_equal(hidden, keep, row, other) for other in distinct):
                distinct.append(row)
        return distinct

    @staticmethod
    def _groups(hidden: torch.Tensor, keep: torch.Tensor, sent: list[int]) -> list[int]:
        return [
            next(i for i, other in enumerate(sent) if _equal(hidden, keep, row, other))
            for row in range(len(hidden))
        ]

    def _exchange(self, rows: list[wire.Row], packed: torch.Tensor) -> torch.Tensor:
        """Sends runs of tokens and their states `[tokens, width]`; waits while workers are full."""
        client = self._client
        deadline = time.monotonic() + client.patience
        avoid: list[bytes] = []
        while True:
            if self._remote is None:
                self._hold(client.open_session(avoid))
            remote = self._remote
            assert remote is not None
            try:
                return self._send(remote, rows, packed)
            except Busy as busy:
                if time.monotonic() + busy.retry_after > deadline:
                    raise
                if remote.ended:
                    self._remote, avoid = None, [remote.worker]
                time.sleep(busy.retry_after)

    def _send(self, remote: RemoteSession, rows: list[wire.Row], packed: torch.Tensor) -> torch.Tensor:
        timings = self._client.timings
        width = packed.shape[1]
        dtype = dtype_name(packed.dtype)
        with timings.measure("encode"):
            requests: list[tuple[wire.Payload, memoryview]] = []
            begin = 0
            for chunk in _chunks(rows, max(1, CHUNK_BYTES // (width * packed.element_size()))):
                count = sum(len(row.positions) for row in chunk)
                select = self._select if not requests else None
                step = wire.Step(dtype, width, chunk, select, remote.acked)
                requests.append((step, to_bytes(packed[begin : begin + count])))
                begin += count
        began = time.perf_counter()
        before = timings.seconds["encrypt"] + timings.seconds["decrypt"]
        replies = remote.call(requests)
        waited = time.perf_counter() - began
        waited -= timings.seconds["encrypt"] + timings.seconds["decrypt"] - before
        self._select = None
        parts = []
        with timings.measure("decode"):
            for reply, data in replies:
                assert isinstance(reply, wire.Result)
                part = from_bytes(data, reply.dtype, reply.tokens, reply.width)
                parts.append(part.to(DTYPES[dtype]))
                timings.add("body", reply.body_us / 1e6)
                timings.add("worker", reply.worker_us / 1e6)
                waited -= (reply.body_us + reply.worker_us) / 1e6
            output = parts[0] if len(parts) == 1 else torch.cat(parts)
        timings.add("queue", max(0.0, waited))
        if output.shape != packed.shape:
            raise Malformed(f"the worker returned states {tuple(output.shape)} for {tuple(packed.shape)}")
        return output.to(packed.device)


class RemoteBody(PassThrough):
    """The layer in the body's first slot. Refuses, by name and before anything is sent, what cannot be split."""

    def __init__(self) -> None:
        super().__init__()
        self.call = Call()
        #: When the slot was last entered and left, by `time.perf_counter`.
        self.entered = self.left = 0.0

    def attach(self, client: Client, split: Split, layers: int, windowed: bool) -> None:
        self._client = client
        self._split = split
        self._layers = layers
        self._windowed = windowed

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden.requires_grad:
            raise UnsupportedFeature("gradients do not pass through the worker: use torch.no_grad()")
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        self.entered = time.perf_counter()
        layer = self._session_layer(cache)
        output = layer.step(hidden, self.call)
        if cache is None:
            layer.reset()
        self.left = time.perf_counter()
        return self.wrap(output)

    def _session_layer(self, cache: Cache | None) -> SessionLayer:
        if cache is None:
            return SessionLayer(self._client, self._windowed)
        check_cache(cache)
        while len(cache.layers) < self._layers:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[self._split.first]
        if not isinstance(layer, SessionLayer):
            if layer.get_seq_length():
                raise UnsupportedFeature("a cache that was filled by an unsplit model cannot be continued here")
            layer = cache.layers[self._split.first] = SessionLayer(self._client, self._windowed)
            for index in self._split.body[1:]:
                cache.layers[index] = DummyLayer()
        return layer


def check_cache(cache: Any) -> None:
    """Raises UnsupportedFeature for a cache that a session cannot be a layer of."""
    if type(cache) is not DynamicCache:
        raise UnsupportedFeature(f"a {type(cache).__name__} cannot be split: use a DynamicCache")
    if getattr(cache, "offloading", False):
        raise UnsupportedFeature("an offloaded cache cannot be split: use a plain DynamicCache")


def _equal(hidden: torch.Tensor, keep: torch.Tensor, one: int, other: int) -> bool:
    return torch.equal(keep[one], keep[other]) and torch.equal(hidden[one][keep[one]], hidden[other][keep[other]])


def _chunks(rows: list[wire.Row], limit: int) -> list[list[wire.Row]]:
    """Cuts runs so that no chunk has more than `limit` tokens."""
    chunks: list[list[wire.Row]] = [[]]
    room = limit
    for row in rows:
        done = 0
        while done < len(row.positions):
            if not room:
                chunks.append([])
                room = limit
            part = row.positions[done : done + room]
            chunks[-1].append(wire.Row(row.row, row.start + done, part))
            done += len(part)
            room -= len(part)
    return chunks


def is_windowed(config: Any, body: range) -> bool:
    """Whether any of the body's layers attends to a window of the cache only."""
    layers = DynamicCache(config=config).layers
    return any(getattr(layers[index], "is_sliding", False) for index in body if index < len(layers))

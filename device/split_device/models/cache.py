"""The body's KV cache as layers of transformers' own cache, which `generate` crops, reorders and copies.

These changes cost no message: they travel with the next step.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from split_common.errors import HistoryLost, UnsupportedFeature
from split_common.models.codecs.base import Codec
from split_common.models.tensors import raw_bytes
from split_common.protocol import payloads
from split_device.models.body_layer import BodyLayer
from split_device.models.branches import Branches
from split_device.models.masks import token_columns
from split_device.models.prepared import PreparedStep, StepContext
from split_device.models.prompt_parts import PromptParts
from split_device.models.traits import Traits
from split_device.sessions.chunks import ChunkRequest, encode
from split_device.sessions.client import Client
from split_device.sessions.connection import HISTORY_MEMORY
from split_device.sessions.distinct import distinct
from split_device.sessions.history import History
from split_device.sessions.identity import SessionIdentity
from split_device.sessions.notices import OnNotice
from split_device.sessions.places import PlacedRun, distinct_axes, first_axis
from split_device.sessions.prefix import SessionPrefix
from split_device.sessions.requests import Reply, Request
from split_device.sessions.resilient import ResilientSession
from split_device.sessions.session import RemoteSession
from split_device.sessions.timings import StepTimings, timed

#: Most chunks of history that travel to a new worker at once.
REPLAY_WINDOW = 8


class SessionCacheLayer(BodyLayer):
    """The cache layer in the body's first slot. It has the session whose worker holds the body's KV cache.

    Not thread-safe, but any thread may `abandon` it.

    Args:
        client: opens the session when the first step is sent.
        traits: the traits of the body.
        window: the sliding window of the first slot, see `BodyLayer`.
        history_memory: bytes of history that stay in memory; the rest is spilled.
        request_id, index: of the request that it belongs to, see `ResilientSession`.
        adapter: the adapter that the session has on its worker; None without one.
        on_notice: takes what is said while a step waits for a worker, beside the client's notices.

    Raises:
        ConfigError: the request id is not one.
    """

    def __init__(
        self,
        client: Client,
        traits: Traits,
        window: int | None = None,
        history_memory: int = HISTORY_MEMORY,
        request_id: str | None = None,
        index: int = 0,
        on_notice: OnNotice | None = None,
        adapter: payloads.UseAdapter | None = None,
    ) -> None:
        super().__init__(None, window)
        self.adapter = adapter
        self.client = client
        self._session = ResilientSession(client, request_id, index, on_notice)
        self._history_memory = history_memory
        self._traits = traits
        #: Which columns hold tokens and not padding, bool `[batch, columns]`; None before the first step.
        self._columns: torch.Tensor | None = None
        #: The worker's row for each row, if rows were moved since the last step; else None.
        self._select: list[int] | None = None
        self._history = History(self._history_memory)
        #: What its worker has of trees.
        self._branches = Branches()
        #: Whether it could not be rebuilt on a worker that is indivisible.
        self._lost_by_division = False

    # --- what transformers asks of a cache layer -----------------------------------------------------------

    def get_seq_length(self) -> int:
        return 0 if self._columns is None else int(self._columns.shape[1])

    def crop(self, tokens: int) -> None:
        """Removes the last `-tokens` columns. A positive number is the length to keep (older transformers)."""
        if self._columns is not None:
            self._columns = self._columns[:, : tokens if tokens > 0 else max(0, self.get_seq_length() + tokens)]
            self._history.crop(self._columns.shape[1])
            self._branches.crop(self._columns.shape[1])

    def keep(self, begin: int, kept: Sequence[int]) -> None:
        """Removes all columns from `begin` on but those with these indices, counted from there, ascending.

        They are of the last step. That costs no message: it travels with the next step.
        """
        assert self._columns is not None
        self._columns = self._columns[:, : begin + len(kept)]
        self._history.replace(begin, *self._branches.choose(begin, kept))

    @property
    def settled(self) -> int:
        """How many of its first tokens its worker holds in their places."""
        return self._branches.settled(self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = torch.arange(0 if self._columns is None else len(self._columns))
        self._select_rows(rows[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        count = 0 if self._columns is None else len(self._columns)
        self._select_rows([row for row in range(count) for _ in range(repeats)])

    def reset(self) -> None:
        self._session.close()
        self._columns, self._select, self._branches = None, None, Branches()
        self._history = History(self._history_memory)

    def __deepcopy__(self, memo: dict[int, Any]) -> SessionCacheLayer:
        copied = type(self)(
            self.client,
            self._traits,
            self._window,
            self._history_memory,
            self.identity.request_id,
            adapter=self.adapter,
        )
        memo[id(self)] = copied
        copied._columns = None if self._columns is None else self._columns.clone()
        copied._select = None if self._select is None else list(self._select)
        copied._history, copied._branches = self._history.clone(), copy.copy(self._branches)
        copied._session = self._session.fork()
        return copied

    def begin_with(self, prefix: SessionPrefix, tokens: int) -> None:
        """Makes a new session begin with the first tokens of another one, whose adapter is the same."""
        self._columns = torch.ones(1, tokens, dtype=torch.bool)
        self._history = prefix.history.fork(tokens)
        self._session.begin_as_copy(prefix.remote)

    def prefix(self) -> SessionPrefix | None:
        """What the session holds now, which others may begin with while it goes on; None if no worker has it."""
        return self._as_prefix(self._session.remote)

    def detach(self) -> SessionPrefix | None:
        """What the session holds now. Its worker keeps that, and the session begins anew; None if it does not."""
        if self._history.is_lost or self._session.moved or self.indivisible:
            # What a worker that is gone, or was revoked, has computed is not handed on.
            return None
        prefix = self._as_prefix(self._session.detach())
        if prefix is not None:
            self.reset()
        return prefix

    def _as_prefix(self, remote: RemoteSession | None) -> SessionPrefix | None:
        if remote is None or remote.ended or remote.indivisible or self._history.is_lost:
            return None
        length = self.settled
        return SessionPrefix(remote, self._history.fork(length), length, self.adapter)

    @property
    def indivisible(self) -> bool:
        """Whether its worker computes tokens differently if they go through in parts and not together.

        Also after HistoryLost, if its tokens went through in parts and so could not be rebuilt on such a worker.
        """
        remote = self._session.remote
        return self._lost_by_division or (remote is not None and remote.indivisible)

    @property
    def copied(self) -> bool:
        """Whether its worker has it as a copy of the session that it began with."""
        return self._session.copied

    def _select_rows(self, rows: list[int]) -> None:
        if self._columns is None:
            return
        self._columns = self._columns[rows]
        self._select = rows if self._select is None else [self._select[row] for row in rows]
        self._history.select(rows)

    # --- a step --------------------------------------------------------------------------------------------

    def step(self, hidden: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Runs the body over hidden states `[batch, tokens, width]`, and counts this as a step of its own.

        Raises:
            UnsupportedFeature, NonFinite, SplitError: as `prepare` and `exchange`.
        """
        step = self.prepare(hidden, context)
        result = self.commit(step, self.exchange(step))
        self.client.timings.record(step.timings)
        return result

    def stream(self, parts: PromptParts) -> torch.Tensor:
        """Runs the body over a prompt that comes in parts, as one step. Returns the output of the last message.

        Raises:
            SplitError: as `exchange`, or what `parts` raises; the session then holds what it held before.
        """
        step = self.prepare(parts.states[None], StepContext(last=parts.wanted(last=False), room=parts.room))
        step.parts = parts
        parts.begin(step, self._places)
        self._session.call(self, step)
        parts.finish()
        self._columns, self._branches.kept = step.columns, ()
        self._history.append(step.hidden, step.places)
        self.client.timings.record(step.timings)
        return parts.output

    def prepare(self, hidden: torch.Tensor, context: StepContext) -> PreparedStep:
        """Encodes hidden states `[batch, tokens, width]`, without padding, and equal rows once. Changes no state.

        Raises:
            UnsupportedFeature: the mask or the positions cannot be expressed as a KV cache.
            NonFinite: the states hold NaN or infinity.
        """
        batch, tokens, _ = hidden.shape
        cached, keep = token_columns(self._columns, batch, tokens, context.mask, self._traits)
        if (context.parents or self._branches.kept) and not bool(keep.all()):
            raise UnsupportedFeature("a tree of tokens, or what follows it, cannot have padding")
        positions = self._positions(batch, tokens, context.positions_after(self.get_seq_length()))
        places = self._places(positions, context.ahead)
        rows, copies = self._distinct(hidden, keep, places)
        sent: torch.Tensor | None = None
        wanted: torch.Tensor | None = None
        if len(rows) < batch or not keep.all():
            sent = torch.zeros_like(keep)
            sent[rows] = keep[rows]
        if context.last is not None and context.last < tokens:
            wanted = torch.zeros_like(keep)
            wanted[:, tokens - context.last :] = True if sent is None else sent[:, tokens - context.last :]
        starts = cached.sum(1).tolist()
        runs = [
            PlacedRun(index, starts[row], places[row][keep[row]], tuple(context.parents))
            for index, row in enumerate(rows)
            if keep[row].any()
        ]
        columns, moved = torch.cat([cached, keep], 1), (rows, copies) if len(rows) < batch else None
        codec, room = context.sizes(self.client.codec, batch, self.client.pad_steps)
        step = PreparedStep(hidden, places, columns, sent, wanted, moved, runs, context.timings, codec, room)
        step.requests = step.encode(self._horizon(places))
        return step

    def exchange(self, step: PreparedStep) -> torch.Tensor:
        """Sends a step. Returns the output of its tokens, `[tokens, width]`. Waits while workers are full.

        Raises:
            SplitError: the worker or the queue failed, and no other worker took over.
        """
        if not step.requests:
            return step.hidden.new_empty(0, step.hidden.shape[-1])
        replies = self._session.call(self, step)
        return step.decode(replies)

    def commit(self, step: PreparedStep, output: torch.Tensor) -> torch.Tensor:
        """Records a step that has run. Returns its output `[batch, tokens, width]`, zero for padding."""
        result = step.place(output)
        if step.copies is not None:
            self._select = step.copies[1]
        self._columns = step.columns
        self._history.append(step.hidden, step.places)
        if any(run.parents for run in step.runs):
            self._branches.stepped(step.columns.shape[1], step.hidden, step.places)
        return result

    @property
    def takes_trees(self) -> bool:
        """Whether its worker takes several continuations at once; False if it has none."""
        remote = self._session.remote
        return remote is not None and remote.channel.takes_trees

    @property
    def waits_for_room(self) -> bool:
        """Whether its step waits because workers are full. Any thread may read it."""
        return self._session.waits_for_room

    @property
    def identity(self) -> SessionIdentity:
        """What its user and its workers call its session."""
        return self._session.identity

    def abandon(self, at_once: bool = True) -> None:
        """Makes the step under way in another thread, and all later ones, fail soon; or lets that one end."""
        (self._session.abandon if at_once else self._session.leave)()

    def _horizon(self, places: torch.Tensor) -> int | None:
        """The largest position of a call; None if positions do not interact."""
        return int(first_axis(places, 2).max()) if self._traits.positions_interact else None

    def _positions(self, batch: int, tokens: int, positions: torch.Tensor | None) -> torch.Tensor:
        """Position ids, int64 `[batch, tokens]`, or `[axes, batch, tokens]` if axes differ, on the CPU."""
        if positions is None:
            past = self.get_seq_length()
            positions = torch.arange(past, past + tokens)[None]
        positions = distinct_axes(positions, self._traits.axes or 1)
        return positions.cpu().expand(*positions.shape[:-2], batch, tokens)

    def _places(self, positions: torch.Tensor, ahead: torch.Tensor | None) -> torch.Tensor:
        """Positions as places. `ahead` is how many of the tokens after it each token attends to."""
        if self._traits.axes is None:
            return positions
        if positions.ndim == 2:
            positions = positions.expand(self._traits.axes, *positions.shape)
        last = torch.zeros_like(positions[0]) if ahead is None else ahead.cpu()
        return torch.cat([positions, last[None]]).permute(1, 2, 0).contiguous()

    def _distinct(
        self, hidden: torch.Tensor, keep: torch.Tensor, places: torch.Tensor
    ) -> tuple[list[int], list[int]]:
        """The rows to send, and for each row the index of its equal in this list.

        When a session starts, equal rows (beams, and returned sequences) travel once, and the worker forks them:
        it has to have them then, so none of them is all padding.
        """
        every = list(range(len(hidden)))
        if self._columns is not None or len(hidden) == 1 or not keep.any(1).all():
            return every, every
        return distinct(
            tuple(bytes(raw_bytes(tensor)) for tensor in (mine, places[row][mine], hidden[row][mine]))
            for row, mine in enumerate(keep)
        )

    # --- what fail-over asks of a step (`Replayable`) ------------------------------------------------------

    @property
    def is_new(self) -> bool:
        return not self.get_seq_length()

    def replay(self, session: RemoteSession, step: PreparedStep) -> None:
        """Chooses the adapter, and fills a worker's cache from the history. Raises HistoryLost, and as `send`."""
        step.check_padding(session)
        if self.adapter is not None:
            session.begin_with(self.adapter)
        # The rows of the history are in their present order already, and have no tokens that do not stay.
        self._select, self._branches.kept = None, ()
        requests = self._replayed(session.indivisible, step.timings)
        try:
            while window := list(itertools.islice(requests, REPLAY_WINDOW)):
                self._send(session, window, self.client.codec, step.timings)
        except HistoryLost:
            self._lost_by_division = session.indivisible
            raise

    def send(self, session: RemoteSession, step: PreparedStep) -> list[Reply]:
        step.check_padding(session)
        step.brief, step.pads = session.brief, session.channel.pads
        if step.room is not None and not step.pads:
            self.client.say_unpadded(session.channel)
        step.kept = self._branches.kept
        if (parts := step.parts) is not None:
            return timed(step.timings, lambda: session.stream(parts.requests(), step.timings))
        if session.indivisible and len(step.requests) > 1:
            step.requests = step.encode(self._horizon(step.places), whole_runs=True)
        return self._send(session, step.requests, step.codec, step.timings)

    def is_spoilt(self, step: PreparedStep) -> bool:
        # Some of several chunks may have run, and the first one moves the worker's rows.
        return bool(self._select or self._branches.kept) and len(step.requests) > 1

    def describe(self, step: PreparedStep) -> tuple[int, int, int]:
        rows = {run.row for chunk, _ in step.requests for run in chunk.runs}
        return len(rows), sum(len(chunk.states) for chunk, _ in step.requests), self.get_seq_length()

    def _replayed(self, indivisible: bool, timings: StepTimings) -> Iterator[ChunkRequest]:
        if self._columns is None:
            return
        interact = self._traits.positions_interact
        for runs, packed, last in self._history.replay(self._columns, interact or indivisible, indivisible):
            # The outputs have come before.
            wanted, horizon = torch.zeros(len(packed), dtype=torch.bool), last if interact else None
            with timings.measure("encode"):
                requests = encode(self.client.codec, runs, packed, horizon, indivisible, wanted)
            yield from requests

    def _send(
        self, session: RemoteSession, requests: Sequence[ChunkRequest], codec: Codec, timings: StepTimings
    ) -> list[Reply]:
        steps: list[Request] = []
        for chunk, data in requests:
            select, kept = (None, ()) if steps else (self._select, self._branches.kept)
            pads, trees = session.channel.pads, session.channel.takes_trees
            steps.append(chunk.request(select, codec, data, session.brief, pads, trees, kept))
        replies = timed(timings, lambda: session.call(steps, timings))
        # The worker has moved its rows.
        self._select, self._branches.kept = None, ()
        return replies

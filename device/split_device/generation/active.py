"""A request that runs, and the thread that waits for its session."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from split_common.engine.sequences import KVSequence
from split_common.engine.trees import depths
from split_common.errors import SplitError
from split_device.generation.placing import PlacedPrompt, Placement
from split_device.generation.request import Generation
from split_device.generation.sampling import Sampler
from split_device.models.cache import SessionCacheLayer
from split_device.models.prepared import StepContext
from split_device.models.prompt_parts import Part, PromptParts
from split_device.sessions.prefix import SessionPrefix
from split_device.speculation.speculation import Speculation


@dataclass(frozen=True)
class OutputPart:
    """The output `[tokens, width]` of a step's next tokens, of which more are at the worker or on their way."""

    states: torch.Tensor


#: Keeps tokens of a sequence, see `KVSequence.keep`.
Keep = Callable[[KVSequence, int, Sequence[int]], None]

#: The outcome of a step, or of a part of it: states `[tokens, width]`, or an error.
Outcome = torch.Tensor | OutputPart | Exception


@dataclass(eq=False)
class ActiveRequest:
    """A request that has a sequence in head and tail, and a session.

    The generator's thread uses it. The session's thread takes from the outbox and calls the session.
    """

    generation: Generation
    sampler: Sampler
    session: SessionCacheLayer
    #: Its keys and values in head and tail; None for an end without layers.
    sequences: tuple[KVSequence | None, KVSequence | None]
    #: Memory that is reserved for it in head and tail, in units of their stores.
    costs: tuple[int, int]
    #: Tokens that have not entered the head yet; those of one list go through the model together.
    pending: deque[list[int]]
    #: Number of tokens in the first list of `pending`, when the request began.
    prompt_tokens: int
    #: Whether tokens go through together as the unsplit model would have them.
    undivided: bool
    #: Whether of its prompt only the last token's output is needed.
    last_only: bool
    #: The tokens for which its decoding steps have room.
    room: int = 1
    awaits_first_token: bool = True
    #: Number of tokens that have entered the head, and the tail.
    head_tokens: int = 0
    tail_tokens: int = 0
    #: When its states became ready for a worker, or for the tail, by `time.monotonic`.
    ready_since: float = 0.0
    #: Number of tokens that it began with, of another request's.
    copied_tokens: int = 0
    #: What its session held when the latest part of its prompt was through; None before.
    prefix: SessionPrefix | None = None
    #: Drafts its next tokens; None if it goes on one by one.
    speculation: Speculation | None = None
    #: Those tokens of the step under way, at its end, which may not be those of the text.
    drafts: list[int] = field(default_factory=list)
    #: The token of its latest step that each of that step's tokens follows, -1 for the one before the step; empty
    #: if each follows the one before it.
    parents: list[int] = field(default_factory=list)
    #: Number of tokens in its latest decoding step; 0 before the first one.
    step_tokens: int = 0
    #: The last token of its text that is in that step.
    last_token: int = 0
    #: The states `[tokens, width]` that went to its worker last.
    sent: torch.Tensor | None = None
    #: Parts of its step that have not left for the worker; and those that are back, before the last one, and not
    #: through the tail.
    parts_to_send: int = 0
    parts_in_tail: int = 0
    ended: bool = False
    #: Its prompt, if that has images and is embedded.
    placed: PlacedPrompt | None = None
    #: States `[tokens, width]` for the worker, and whether they are a step's last ones; None ends the session's
    #: thread.
    outbox: queue.SimpleQueue[Part | None] = field(default_factory=queue.SimpleQueue)

    @property
    def adapter(self) -> int | None:
        """The number of its adapter; None without one."""
        adapter = self.generation.adapter
        return None if adapter is None else adapter.number

    @property
    def placement(self) -> Placement | None:
        """Where its tokens are; None if their positions are their indices."""
        return None if self.placed is None else self.placed.placement

    def positions(self, begin: int, count: int) -> Sequence[int]:
        """The positions, on the first axis, of the tokens from index `begin` on."""
        if self.parents:
            return [begin + depth for depth in depths(self.parents)]
        if (placement := self.placement) is None:
            return range(begin, begin + count)
        positions: list[int] = placement.positions_of(begin, count)[0].tolist()
        return positions

    def with_images(self, begin: int, states: torch.Tensor) -> torch.Tensor:
        """Embeddings `[tokens, width]` of tokens from index `begin` on; those of its prompt with their images."""
        if self.placed is None or begin >= len(self.placed.states):
            return states
        own = self.placed.states[begin : begin + len(states)]
        return torch.cat([own, states[len(own) :]])

    def drop_drafts(self, path: Sequence[int], keep: Sequence[Keep]) -> None:
        """Takes back what a step has computed of its draft, but for some tokens.

        Args:
            path: the indices of these tokens in the draft, each the parent of the next one.
            keep: keeps tokens of the sequences in head and tail.
        """
        begin = self.tail_tokens - len(self.drafts)
        tree, self.drafts, self.parents = bool(self.parents), [], []
        tokens = begin + len(path)
        if tokens == self.tail_tokens:
            return
        self.head_tokens = self.tail_tokens = tokens
        for sequence, keep_of in zip(self.sequences, keep, strict=True):
            if sequence is not None:
                keep_of(sequence, begin, path)
        if tree:
            self.session.keep(begin, path)
        else:
            self.session.crop(tokens)

    @property
    def has_draft(self) -> bool:
        """Whether it goes on, and its step under way has a draft."""
        return bool(self.drafts) and not self.ended

    def without_drafts(self) -> torch.Tensor:
        """Takes back the draft of the step that its worker has refused. Returns the states that are left of it."""
        assert self.sent is not None
        drafted, self.drafts, self.parents = len(self.drafts), [], []
        self.head_tokens -= drafted
        self.step_tokens -= drafted
        if (head := self.sequences[0]) is not None:
            head.truncate(self.head_tokens)
        if self.speculation is not None:
            self.speculation.limit = 0
        return self.sent[: len(self.sent) - drafted]

    @property
    def tokens(self) -> list[int]:
        """The prompt and what was generated so far."""
        return [*self.generation.request.prompt, *self.generation.tokens]

    @property
    def priority(self) -> int:
        return self.generation.request.priority

    def send(self, states: torch.Tensor) -> bool:
        """Hands states `[tokens, width]` to the session's thread. Returns whether they are a step's last ones."""
        self.parts_to_send -= 1
        is_last = self.parts_to_send == 0
        self.sent = states if self.drafts else None
        self.outbox.put((states, is_last))
        return is_last

    def session_loop(self, on_outcome: Callable[[ActiveRequest, Outcome], None]) -> None:
        """Runs the steps of the outbox on a worker until it holds None, then frees the session.

        Args:
            on_outcome: called on this thread after each step, and with each part of an output that comes before.
        """
        while (part := self.outbox.get()) is not None:
            outcome: Outcome
            try:
                with torch.inference_mode():
                    outcome = self._run(part, lambda states: on_outcome(self, OutputPart(states)))
            except Exception as error:
                outcome = error
            on_outcome(self, outcome)
            if isinstance(outcome, Exception) and not part[1]:
                # The request ends. Further parts of the step may still come before.
                while self.outbox.get() is not None:
                    pass
                break
        self.session.reset()

    def _run(self, part: Part, on_output: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Runs a step whose first part is this one. Returns the last part of its output."""
        states, is_last = part
        last_only = self.last_only and self.awaits_first_token
        if is_last:
            context = self._context(len(states))
            context.last = 1 if last_only else None
            return self.session.step(states[None], context)[0]
        return self.session.stream(PromptParts(states, self._next_part, on_output, last_only, self._room))

    def _next_part(self, wait: bool) -> Part | None:
        try:
            part = self.outbox.get(wait)
        except queue.Empty:
            return None
        if part is None:
            # For the loop.
            self.outbox.put(None)
            raise SplitError("the request has ended")
        return part

    def _context(self, tokens: int) -> StepContext:
        """What its session has to know of its next tokens."""
        placement, room = self.placement, self._room
        if placement is None:
            return StepContext(room=room, parents=self.parents)
        return replace(placement.context(self.session.get_seq_length(), tokens), room=room)

    @property
    def _room(self) -> int | None:
        return None if self.awaits_first_token else self.room

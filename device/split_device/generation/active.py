"""A request that runs, and the thread that waits for its session."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from split_common.engine.sequences import KVSequence
from split_common.engine.trees import depths
from split_common.errors import SplitError
from split_device.generation.flights import Legs
from split_device.generation.placing import PlacedPrompt, Placement
from split_device.generation.request import Generation
from split_device.generation.sampling import Sampler
from split_device.models.flight import FlyingCacheLayer, Landed, Leg
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


@dataclass(frozen=True)
class LegOutput:
    """The output `[tokens, width]` of one of several steps that are away."""

    leg: Leg
    states: torch.Tensor


#: The outcome of a step, or of a part of it: states `[tokens, width]`, or an error; or the end of a flight.
Outcome = torch.Tensor | OutputPart | LegOutput | Landed | Exception


@dataclass(eq=False)
class ActiveRequest:
    """A request that has a sequence in head and tail, and a session.

    The generator's thread uses it. The session's thread takes from the outbox and calls the session.
    """

    generation: Generation
    sampler: Sampler
    session: FlyingCacheLayer
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
    #: Its decoding steps, once it has sent one ahead; None before.
    legs: Legs | None = None
    #: Whether the last one that the session's thread sent did not fail.
    flew: bool = True
    #: States `[tokens, width]` for the worker, and whether they are a step's last ones; or one of several steps
    #: that are away. None ends the session's thread.
    outbox: queue.SimpleQueue[Part | Leg | None] = field(default_factory=queue.SimpleQueue)

    @property
    def adapter(self) -> int | None:
        """The number of its adapter; None without one."""
        adapter = self.generation.adapter
        return None if adapter is None else adapter.number

    @property
    def placement(self) -> Placement | None:
        """Where its tokens are; None if their positions are their indices."""
        return None if self.placed is None else self.placed.placement

    def take_pending(self) -> list[list[int]]:
        """Takes the tokens that enter the head next: the first list, or all steps that leave together."""
        if self.legs is None:
            return [self.pending.popleft()]
        pending = [*self.pending]
        self.pending.clear()
        return pending

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
        if tokens == self.tail_tokens == self.head_tokens:
            return
        self.head_tokens = self.tail_tokens = tokens
        for sequence, keep_of in zip(self.sequences, keep, strict=True):
            if sequence is not None:
                keep_of(sequence, begin, path)
        if tree:
            self.session.keep(begin, path)
        elif self.legs is None:
            self.session.crop(tokens)
        # Else the next step says where it starts: the session's thread may be at work.

    def goes_on(self, tokens: Sequence[int], matched: int) -> bool:
        """Whether its next step is away already, and begins with the token that was chosen after all of a draft.

        Args:
            tokens: those that were chosen.
            matched: how many of them the draft had.
        """
        if self.legs is None or not matched == len(self.drafts) == len(tokens) - 1:
            return False
        if not self.legs.go_on(tokens[-1]):
            return False
        self.sent = self.legs.sent
        return True

    @property
    def is_away(self) -> bool:
        """Whether its step had left before the one in front of it was checked."""
        return self.legs is not None and self.legs.sent is not None

    def take_early(self) -> list[torch.Tensor]:
        """The output `[tokens, width]` of its step, if that came before the one in front of it was checked."""
        if self.legs is None or self.ended or (output := self.legs.take_early()) is None:
            return []
        self.ready_since = time.monotonic()
        return [output]

    def landing(self, outcome: Outcome) -> tuple[bool, torch.Tensor | Exception | None]:
        """Takes an outcome. Returns whether its session's thread has nothing more, and what became of its step.

        That is None if the step is not concerned.
        """
        if self.legs is None or not isinstance(outcome, LegOutput | Landed):
            assert isinstance(outcome, torch.Tensor | Exception)
            return True, outcome
        if isinstance(outcome, LegOutput):
            concerns = self.legs.returned(outcome.leg, outcome.states) or self.session.indivisible
            return False, outcome.states if concerns and not outcome.leg.void else None
        error = self.legs.landed(outcome)
        return not self.legs.away, error

    @property
    def has_draft(self) -> bool:
        """Whether it goes on, and its step under way has a draft."""
        return bool(self.drafts) and not self.ended

    def without_drafts(self) -> torch.Tensor:
        """Takes back the draft of the step that its worker has refused. Returns the states that are left of it."""
        assert self.sent is not None
        drafted, self.drafts, self.parents = len(self.drafts), [], []
        self.step_tokens -= drafted
        self.head_tokens = self.tail_tokens + self.step_tokens
        if self.legs is not None:
            self.legs.add(self.tail_tokens, self.tokens[-self.step_tokens :], self.room)
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
        if self.legs is not None and self.legs.unsent:
            self.outbox.put(self.legs.leaves(states))
            self.sent = self.legs.sent
            self.session.nudge()
            return True
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
            if isinstance(part, Leg):
                on_outcome(self, self._fly(part, lambda *output: on_outcome(self, LegOutput(*output))))
                continue
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

    def _fly(self, leg: Leg, on_output: Callable[[Leg, torch.Tensor], None]) -> Landed:
        """Runs a step, and those that come while any is away. Those behind one that has failed are lost with it."""
        if leg.void or not (leg.begins or self.flew):
            return Landed(1, [leg], None)
        with torch.inference_mode():
            landed = self.session.fly(leg, self._next_leg, on_output)
        self.flew = landed.error is None
        return landed

    def _next_leg(self) -> Leg | None:
        leg = self._next(False)
        assert leg is None or isinstance(leg, Leg)
        return leg

    def _next_part(self, wait: bool) -> Part | None:
        part = self._next(wait)
        assert not isinstance(part, Leg)
        return part

    def _next(self, wait: bool) -> Part | Leg | None:
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

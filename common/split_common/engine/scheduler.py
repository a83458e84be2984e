"""The scheduler: which tokens go into the next forward.

All decoding steps that are ready go into it; of very many tokens, those whose turn it is. The rest of the budget
goes to prefills, in chunks, so that decoding waits for one chunk at most. Members take turns, however many devices
and sessions each has. If forwards are slow, prefill of members that are not decoding goes first. A member that
prefills for more than its share of the time gets what the others leave.

A step passes through the scheduler like this. The caller acts on what each call returns:

    add -> (the session's earlier steps end, its turn comes) -> start -> next_batch -> finish, until complete -> end
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import torch

from split_common.engine.forward_times import DECODING_FOR, ChunkBudget
from split_common.engine.sequences import KVStore, Run
from split_common.engine.steps import ScheduledChunk, ScheduledStep
from split_common.engine.turns import FairTurns, PrefillShares, next_few

#: Most tokens of a decoding step, because speculative decoding verifies several at once. A longer step is prefill.
DECODE_TOKENS = 16

#: Most runs in one forward.
MAX_ROWS = 256

#: Seconds for which a step waits for memory while others run, before sessions give way to it.
STARVED_AFTER = 1.0

#: Seconds above which a forward is slow. Prefill then does not wait for sessions that are due back, and prefill of
#: members that are not decoding goes first, because it brings a first token. On such hardware, two forwards take no
#: longer than one forward of both.
SLOW_FORWARD = 0.05

#: Seconds for which steps of members that have had more than their share are held at a time.
HELD = 0.02

_Run = TypeVar("_Run", bound=Run)
_Request = TypeVar("_Request")


def is_prefill(tokens: int) -> bool:
    """Whether a step of this many tokens is prefill; if not, it is decoding."""
    return tokens > DECODE_TOKENS


class Scheduler(Generic[_Request, _Run]):
    """Holds the steps that wait or run, and chooses those of each forward. Not thread-safe: one thread computes.

    Args:
        store: the sequences' memory; None if steps take no memory.
        divisible: whether prefill may be computed in chunks. It may not if rotary embeddings depend on a
            prompt's last position.
        holding: whether it may hold back all that is ready (`holds`).
    """

    def __init__(self, store: KVStore | None, *, divisible: bool = True, holding: bool = False) -> None:
        self._store = store
        self._divisible = divisible
        self._holding = holding
        #: The first step of each session, which has started or may start.
        self._active: OrderedDict[Hashable, ScheduledStep[_Request, _Run]] = OrderedDict()
        self._waiting: dict[Hashable, deque[ScheduledStep[_Request, _Run]]] = {}
        # Members that had a chunk of prefill, the most recent one last. An ordered set.
        self._turns: dict[Hashable, None] = {}
        self._fair = FairTurns()
        self._shares = PrefillShares()
        # Members whose prefill exceeds their share while others are there, and what each owes them, in seconds.
        self._over: dict[Hashable, float] = {}
        #: Seconds after which the caller asks again, because all that is ready waits until other members have had
        #: their share; 0 if something else is ready, or nothing.
        self.holds = 0.0
        # When each member was last decoding.
        self._decoded_at: dict[Hashable, float] = {}
        # Whether the last forward was of urgent prefills.
        self._urgent_went = False
        self.budget = ChunkBudget()

    @property
    def idle(self) -> bool:
        """Whether there are no steps."""
        return not self._active

    def busy_sessions(self) -> set[Hashable]:
        """The sessions that have steps."""
        return set(self._active)

    def has_more(self, session: Hashable) -> bool:
        """Whether a session has steps behind its first one."""
        return session in self._waiting

    def add(self, step: ScheduledStep[_Request, _Run]) -> ScheduledStep[_Request, _Run] | None:
        """Takes a step. Returns it if it may start now. If not, `end` or `due` returns it when it may."""
        if step.session in self._active:
            self._waiting.setdefault(step.session, deque()).append(step)
            return None
        return self._activate(step)

    def _activate(self, step: ScheduledStep[_Request, _Run]) -> ScheduledStep[_Request, _Run] | None:
        """Makes a step its session's first one. Returns it if it may start now."""
        self._active[step.session] = step
        if not step.weight:
            return step
        step.pending = True
        step.turn = self._fair.tag(step.member, step.weight)
        return None

    def due(self) -> list[ScheduledStep[_Request, _Run]]:
        """The pending steps whose turn it is, which the caller starts now. None while others are ready."""
        if self._ready():
            return []
        return next_few([step for step in self._active.values() if step.pending])

    def start(self, step: ScheduledStep[_Request, _Run], runs: Sequence[_Run]) -> None:
        """Makes a step's runs ready for forwards. The caller ends a step that is `complete` without any."""
        step.runs = [run for run in runs if run.cost]
        step.done = [0] * len(step.runs)
        step.outputs = [[] for _ in step.runs]
        if step.pending:
            step.pending = False
        elif not step.prefill:
            step.turn = self._fair.tag(step.member, step.cost)
        self._active.move_to_end(step.session)

    def urgent_prefills(self) -> list[ScheduledStep[_Request, _Run]]:
        """Prefills that go before decoding, because forwards are slow and their members are not decoding.

        They do not get two forwards in a row while others wait.
        """
        if self._urgent_went or not self._decoded_at or self.budget.base < SLOW_FORWARD:
            return []
        known = self._decoded_at.keys() | self._over.keys()
        return [step for step in self._ready() if step.prefill and step.member not in known]

    @property
    def has_urgent_prefill(self) -> bool:
        """Whether prefill can run at once, so that the next forward should not wait for sessions that are due."""
        steps = (step for step in self._active.values() if step.prefill and step.member not in self._over)
        return self.budget.base >= SLOW_FORWARD and any(steps)

    def next_batch(self) -> tuple[list[ScheduledChunk[_Request, _Run]], ScheduledStep[_Request, _Run] | None]:
        """Chooses what goes into the next forward, from the steps that are not in flight.

        Returns:
            The chunks, which are in flight from now on, and None. There are no chunks if no step is ready, or if
            it `holds` those that are. If none of the ready steps fits into memory: no chunks, and the oldest such
            step. The caller then frees memory for it or ends it, and asks again.
        """
        self._look_at_shares(time.monotonic())
        urgent = self.urgent_prefills()
        batch = self._fill(urgent) if urgent else []
        self._urgent_went = bool(batch)
        self.holds = 0.0
        if not batch and (ready := self._ready()):
            batch = self._fill(ready)
            starved = next((step for step in ready if step.starved_since is not None), None)
            if not batch and starved is not None:
                # Urgent prefills do not fit either. They have had their turn when the caller asks again.
                self._urgent_went = True
                return [], starved
            self.holds = 0.0 if batch else HELD
        for chunk in batch:
            chunk.step.in_flight = True
        return batch, None

    def overdue(self) -> ScheduledStep[_Request, _Run] | None:
        """A step for which there has been no memory for `STARVED_AFTER`, though others ran; None if there is none.

        The caller frees memory for it and asks again, or has it `wait_on`. Without that, steps that take no more
        memory could keep it for ever from those that do.
        """
        now, free = time.monotonic(), self._store.free if self._store is not None else 0
        for step in self._ready():
            if step.starved_since is not None and step.lacked > free and now - step.starved_since > STARVED_AFTER:
                return step
        return None

    def wait_on(self, step: ScheduledStep[_Request, _Run]) -> None:
        """Has a step wait for as long again before it is overdue."""
        step.starved_since = time.monotonic()

    def _look_at_shares(self, now: float) -> None:
        """Notes who is decoding, and who prefills for more than its share of the time while others are there."""
        self._decoded_at = {member: then for member, then in self._decoded_at.items() if now - then < DECODING_FOR}
        members = self._members
        over = self._shares.over(len(members), now)
        self._over = {member: debt for member, debt in over.items() if members - {member}}

    @property
    def _members(self) -> set[Hashable]:
        """The members that decode or have steps."""
        return self._decoded_at.keys() | {step.member for step in self._active.values()}

    def finish(
        self, batch: Sequence[ScheduledChunk[_Request, _Run]], outputs: Sequence[torch.Tensor], seconds: float
    ) -> list[ScheduledStep[_Request, _Run]]:
        """Takes the outputs of a forward, and how long it took in seconds.

        Returns:
            The steps that it has completed. They stay active until `end`.
        """
        prefill = sum(chunk.run.cost for chunk in batch if chunk.step.prefill)
        decoding = sum(not chunk.step.prefill for chunk in batch)
        self._charge(batch, seconds, max(0.0, seconds - self.budget.base * (decoding > 0)))
        self.budget.observe(decoding, prefill, seconds)
        for chunk, output in zip(batch, outputs, strict=True):
            chunk.step.outputs[chunk.index].append(output)
            chunk.step.done[chunk.index] += chunk.run.cost
        complete = []
        for step in {id(chunk.step): chunk.step for chunk in batch}.values():
            step.in_flight = False
            if not step.prefill:
                self._decoded_at[step.member] = time.monotonic()
            if self._active.get(step.session) is not step:
                # The step was cancelled meanwhile.
                continue
            if step.prefill:
                # The next chunk of prefill is another member's.
                self._turns.pop(step.member, None)
                self._turns[step.member] = None
            if step.complete:
                complete.append(step)
        return complete

    def _charge(self, batch: Sequence[ScheduledChunk[_Request, _Run]], took: float, seconds: float) -> None:
        """Counts how many seconds of a forward that took so long were for prefill, by the tokens of each member."""
        tokens = Counter[Hashable]()
        for chunk in batch:
            if chunk.step.prefill:
                tokens[chunk.step.member] += chunk.run.cost
        now, each = time.monotonic(), seconds / max(1, tokens.total())
        charged = {member: count * each for member, count in tokens.items()}
        self._shares.charge(charged, len(self._members), now - took, now)

    def end(self, step: ScheduledStep[_Request, _Run]) -> ScheduledStep[_Request, _Run] | None:
        """Drops an active step, complete or not. Returns the session's next one, which may start now."""
        del self._active[step.session]
        waiting = self._waiting.get(step.session)
        if not waiting:
            return None
        following = waiting.popleft()
        if not waiting:
            del self._waiting[step.session]
        return self._activate(following)

    def cancel(self, session: Hashable) -> list[ScheduledStep[_Request, _Run]]:
        """Drops all steps of a session, and returns them. The output of a running forward will be ignored."""
        steps = [self._active.pop(session)] if session in self._active else []
        return [*steps, *self._waiting.pop(session, ())]

    def _ready(self) -> list[ScheduledStep[_Request, _Run]]:
        return [step for step in self._active.values() if not (step.in_flight or step.pending)]

    def _fill(self, ready: Sequence[ScheduledStep[_Request, _Run]]) -> list[ScheduledChunk[_Request, _Run]]:
        batch: list[ScheduledChunk[_Request, _Run]] = []
        free = self._store.free if self._store is not None else 0
        for step in self._whole(ready):
            chunks = [ScheduledChunk(step, index, run) for index, run in enumerate(step.runs)]
            memory = sum(chunk.run.memory(chunk.run.cost) for chunk in chunks)
            if self._fits(step, memory, free) and len(batch) + len(chunks) <= MAX_ROWS:
                free -= memory
                batch += chunks
        if batch:
            self._fair.went(max(chunk.step.turn for chunk in batch))
        budget = self.budget.tokens()
        for step in self._in_turns(ready):
            if budget <= 0:
                break
            if step.member in self._over and (batch or self._waits(step, budget)):
                step.starved_since = None
                continue
            for index, run in enumerate(step.runs):
                begin = step.done[index]
                count = run.cost - begin
                if self._divisible:
                    count = run.whole(begin, min(budget, count)) if budget > 0 else 0
                memory = run.memory(count)
                if count <= 0 or not self._fits(step, memory, free) or len(batch) >= MAX_ROWS:
                    continue
                free -= memory
                budget -= count
                batch.append(ScheduledChunk(step, index, run.part(begin, count)))
        return batch

    def _waits(self, step: ScheduledStep[_Request, _Run], budget: int) -> bool:
        """Whether a step of a member that owes time waits for others that decode, though none is here just now.

        That is so if what would go into the forward is more than its budget: those that come back soon would then
        wait for it.
        """
        if not (self._holding and self._decoded_at.keys() - self._over.keys()):
            return False
        if not self._divisible:
            return step.cost - sum(step.done) > budget
        begin, run = next((done, run) for done, run in zip(step.done, step.runs, strict=True) if done < run.cost)
        return run.whole(begin, min(budget, run.cost - begin)) > budget

    def _fits(self, step: ScheduledStep[_Request, _Run], memory: int, free: int) -> bool:
        """Whether there is memory for what of a step could go into a forward. Notes since when there is none."""
        if memory <= free:
            step.starved_since = None
            return True
        step.lacked = memory
        if step.starved_since is None:
            step.starved_since = time.monotonic()
        return False

    def _whole(self, ready: Sequence[ScheduledStep[_Request, _Run]]) -> list[ScheduledStep[_Request, _Run]]:
        """The steps that are not prefill, or those of them that go into one forward: in turns, if not all do.

        While several members decode, each that is ready has one at least, and there are about as many tokens as
        there may be rows, or as prefill may have.
        """
        steps = [step for step in ready if not step.prefill]
        divides = self._store is not None and len(self._members) > 1
        left = max(MAX_ROWS, self.budget.tokens()) if divides else math.inf
        if sum(len(step.runs) for step in steps) > MAX_ROWS or sum(step.cost for step in steps) > left:
            steps.sort(key=lambda step: step.turn)
        few: list[ScheduledStep[_Request, _Run]] = []
        here: set[Hashable] = set()
        for step in steps:
            if step.cost <= left or step.member not in here:
                few.append(step)
                here.add(step.member)
                left -= step.cost
        return few

    def _in_turns(self, ready: Sequence[ScheduledStep[_Request, _Run]]) -> list[ScheduledStep[_Request, _Run]]:
        """Prefills in turns: each member's first before any second. The member of the last chunk comes last.

        Those of members that have had more than their share come after all others: what is owed most, last.
        """
        queues: dict[Hashable, deque[ScheduledStep[_Request, _Run]]] = {}
        for step in ready:
            if step.prefill:
                queues.setdefault(step.member, deque()).append(step)
        here = {step.member for step in self._active.values()}
        self._turns = {member: None for member in self._turns if member in here}
        last = [member for member in self._turns if member in queues]
        queues = {
            member: queues[member] for member in [*(each for each in queues if each not in self._turns), *last]
        }
        order: list[ScheduledStep[_Request, _Run]] = []
        while queues:
            for member in list(queues):
                order.append(queues[member].popleft())
                if not queues[member]:
                    del queues[member]
        return sorted(order, key=lambda step: self._over.get(step.member, 0.0))

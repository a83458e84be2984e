"""A prompt whose parts come from the head one after the other: each travels while the head computes the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from split_device.models.prepared import PreparedStep
from split_device.sessions.chunks import encode
from split_device.sessions.places import PlacedRun
from split_device.sessions.requests import Reply, Request

#: States `[tokens, width]` of the next tokens, and whether they are the last ones.
Part = tuple[torch.Tensor, bool]

#: Positions `[1, tokens]` as places `[1, tokens, ...]` (`split_device.sessions.places`).
Places = Callable[[torch.Tensor, None], torch.Tensor]


@dataclass
class PromptParts:
    """What a `SessionCacheLayer` streams: a prompt of one row without padding. One thread uses it.

    Args:
        states: of the first part, `[tokens, width]`.
        take_next: the next part; None if there is none yet, unless it is told to wait. It raises SplitError if no
            further one will come.
        on_output: takes the body's output `[tokens, width]` of each message but the last one, in their order, as
            they come.
        last_only: whether the output of the prompt's last token alone is wanted; that of the others is zero then.
        room: of its messages, as in a `StepContext`.
    """

    states: torch.Tensor
    take_next: Callable[[bool], Part | None]
    on_output: Callable[[torch.Tensor], None]
    last_only: bool = False
    #: As `StepContext.room`.
    room: int | None = None
    #: The step, with the parts that have come.
    step: PreparedStep = field(init=False)
    #: Whether all parts have come.
    whole: bool = False
    #: The output of the last message.
    output: torch.Tensor = field(init=False)
    #: How many messages' outputs were handed on.
    _delivered: int = 0

    def begin(self, step: PreparedStep, places: Places) -> None:
        """Begins with a step that has the first part."""
        self.step, self._places = step, places
        self._hidden, self._placed, self._length = [step.hidden], [step.places], step.columns.shape[1]

    def requests(self) -> PartRequests:
        """All requests of the step from the first one on, for a worker that has none of them."""
        return PartRequests(self)

    def wanted(self, last: bool) -> int | None:
        """Of how many tokens at the end of a part, perhaps the last one, the output is wanted; None for all."""
        return int(last) if self.last_only else None

    def more(self, wait: bool) -> bool:
        """Adds the next part to the step. Returns whether there was one."""
        part = self.take_next(wait)
        if part is None:
            return False
        states, self.whole = part
        places = self._places(torch.arange(self._length, self._length + len(states))[None], None)
        runs = [PlacedRun(0, self._length, places[0])]
        wanted = None
        if (last := self.wanted(self.whole)) is not None:
            wanted = torch.arange(len(states)) >= len(states) - last
        with self.step.timings.measure("encode"):
            self.step.requests += encode(self.step.codec, runs, states, None, wanted=wanted, room=self.step.room)
        self._length += len(states)
        self._hidden.append(states[None])
        self._placed.append(places)
        return True

    def finish(self) -> None:
        """Makes the step what it would be if all tokens had come at once."""
        step = self.step
        step.hidden, step.places = torch.cat(self._hidden, 1), torch.cat(self._placed, 1)
        step.columns = torch.ones(1, self._length, dtype=torch.bool)

    def answered(self, index: int, reply: Reply) -> None:
        """Hands the output of a message on, unless an earlier worker has computed it."""
        if index < self._delivered:
            return
        step, chunk = self.step, self.step.requests[index][0]
        with step.timings.measure("decode"):
            output = chunk.output(*reply, step.codec, step.brief).to(step.hidden)
            if chunk.wanted is not None:
                given, output = output, step.hidden.new_zeros(chunk.states.shape)
                output[chunk.wanted] = given
        self._delivered += 1
        if self.whole and self._delivered == len(step.requests):
            self.output = output
        else:
            self.on_output(output)


class PartRequests:
    """The messages of a step that grows (`split_device.sessions.requests.Requests`)."""

    growing = True

    def __init__(self, parts: PromptParts) -> None:
        self._parts = parts
        self._taken = 0

    @property
    def complete(self) -> bool:
        return self._parts.whole and self._taken == len(self._parts.step.requests)

    def take(self, wait: bool) -> Request | None:
        step = self._parts.step
        if self._taken == len(step.requests) and not self._parts.more(wait):
            return None
        chunk, data = step.requests[self._taken]
        self._taken += 1
        kept = step.kept if self._taken == 1 else ()
        return chunk.request(None, step.codec, data, step.brief, step.pads, kept=kept)

    def answered(self, index: int, reply: Reply) -> None:
        self._parts.answered(index, reply)

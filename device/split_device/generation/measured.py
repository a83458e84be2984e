"""What `ping` has measured, and what follows from it for each setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from split_common.engine.scheduler import DECODE_TOKENS
from split_common.models.codecs import EXACT
from split_device.generation.branching import Answered
from split_device.generation.cycles import Spread
from split_device.speculation.drafters import TREE_TOKENS
from split_device.speculation.forecast import LEAST_SHARE, CycleTimes, Forecast, SampleText, forecast
from split_device.speculation.names import AUTO, OFF

#: Mean seconds by the tokens of a step.
Row = Mapping[int, Spread]


@dataclass(frozen=True)
class CodecCost:
    """What a codec takes beside `exact`: seconds for each message and each token, and bytes of a step by tokens."""

    message: float
    token: float
    #: Bytes to the worker and back, of a step of one token and of one of several, by the number of its tokens.
    up: Mapping[int, float]
    down: Mapping[int, float]


@dataclass(frozen=True)
class TreeCost:
    """What drafts of several continuations take and bring."""

    #: A whole cycle of steps of `TREE_TOKENS`, by the number of sessions.
    cycles: Mapping[int, Row]
    #: The sample's answers, by the drafter.
    answers: Mapping[str, Answered]


@dataclass
class Measured:
    """What was measured. Times are in seconds, bandwidths in bits per second."""

    #: From a message of one token to its answer, without the worker's own time.
    round_trip: Spread
    #: None where large messages took no longer than small ones.
    up: Spread | None
    down: Spread | None
    #: Whether the model can speculate, and whether its steps are padded.
    drafts: bool
    pads: bool
    #: The worker's time for a step, and the device's own, by the tokens of the step.
    worker: Row
    device: Row
    #: A whole cycle, by the number of sessions and the tokens of each one's step: without speculation, and with it,
    #: which changes the size of messages.
    plain: Mapping[int, Row]
    cycles: Mapping[int, Row]
    #: None where the model, or its worker, takes no such drafts.
    trees: TreeCost | None
    #: By the codec's name, likewise.
    plain_codecs: Mapping[str, CodecCost]
    codecs: Mapping[str, CodecCost]
    #: Seconds that a drafter takes to learn from what the model expects after a token, by its name.
    learning: Mapping[str, float]
    texts: Sequence[SampleText]
    #: What could not be measured, and why.
    notes: list[str] = field(default_factory=list)

    def choices(self, sessions: int) -> tuple[str, ...]:
        """The drafters, `auto` and `off`, as far as they can be predicted for so many sessions."""
        chains = (AUTO, OFF, *self.learning) if sessions in self.cycles else (OFF,)
        trees = tuple(self.trees.answers) if self.trees is not None and sessions in self.trees.cycles else ()
        return (*chains, *trees)

    def times(self, codec: str, speculate: str = OFF) -> CycleTimes:
        """How long cycles take with a codec and a drafter. What is rare and long belongs to it: hence the means."""
        if speculate == OFF:
            return CycleTimes(_means(self.plain), *self._codec_cost(self.plain_codecs, codec))
        message, token = self._codec_cost(self.codecs, codec)
        if self.trees is not None and speculate in self.trees.answers:
            if self.pads:
                # What a codec saves follows the room of a message, which is larger here.
                message *= TREE_TOKENS / DECODE_TOKENS
            return CycleTimes(_means(self.trees.cycles), message, token)
        plain = self.times(codec) if self.pads and speculate == AUTO else None
        learning = self.learning.get(speculate, 0.0)
        return CycleTimes(_means(self.cycles), message, token, learning, DECODE_TOKENS, plain)

    def _codec_cost(self, codecs: Mapping[str, CodecCost], codec: str) -> tuple[float, float]:
        """Seconds that a codec adds to each message, and to each token of it."""
        cost, plain = codecs[codec], codecs[EXACT]
        message, token = cost.message, cost.token
        for rate, mine, exact in (
            (self.up, cost.up, plain.up),
            (self.down, cost.down, plain.down),
        ):
            if rate is not None:
                of_message, of_token = line({count: mine[count] - exact[count] for count in mine})
                message += 8 * of_message / rate.median
                token += 8 * of_token / rate.median
        return message, token

    def forecast(self, speculate: str, codec: str, sessions: int) -> Forecast:
        """What a setting will give on the sample."""
        times = self.times(codec, speculate)
        if self.trees is None or speculate not in self.trees.answers:
            return forecast(self.texts, speculate, sessions, times, DECODE_TOKENS - 1, self.pads)
        answers, [(tokens, alone)] = self.trees.answers[speculate], self.trees.cycles[1].items()
        # What choosing drafts and tokens takes beside the steps: for each session, one after the other.
        own = answers.seconds / answers.steps - alone.mean
        # Noise may make it less than nothing.
        cycle = times.of(sessions, sessions * tokens)
        seconds = max(LEAST_SHARE * cycle, cycle + sessions * own)
        per_step = answers.tokens / answers.steps
        return Forecast(sessions * per_step / seconds, per_step)


def _means(cycles: Mapping[int, Row]) -> dict[int, dict[int, float]]:
    return {sessions: {tokens: spread.mean for tokens, spread in row.items()} for sessions, row in cycles.items()}


def line(points: Mapping[int, float]) -> tuple[float, float]:
    """What each message and each token of it cost, given the cost of a message by its tokens."""
    few, many = min(points), max(points)
    token = (points[many] - points[few]) / (many - few) if many > few else 0.0
    return points[few] - few * token, token

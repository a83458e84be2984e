"""Drafts for requests: which ones speculate, what their drafters are told, and how long drafts may be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from split_common.engine.scheduler import DECODE_TOKENS
from split_common.errors import UnsupportedFeature
from split_device.generation.active import ActiveRequest
from split_device.generation.checking import Checked
from split_device.generation.local_layers import LocalLayers
from split_device.speculation.drafters import check_choice
from split_device.speculation.names import AUTO, OFF
from split_device.speculation.speculation import Cycle, Pace

#: How many of a request's first tokens its drafter gets, the last ones. It looks at them on the generator's thread,
#: which all requests share: at most some 12 µs a token, so 0.2 s once.
PROMPT_TOKENS = 16_384


class Drafting:
    """Drafts for the requests of one generator, whose thread uses it; any thread may call `choose`.

    Args:
        layers: head and tail.
        default: what requests do that leave it open; as `Limits.speculate`.
        active: the requests that run, as a view.
        counters: counts `drafted_tokens` and `accepted_tokens`.

    Raises:
        ConfigError, UnsupportedFeature: as `choose`, for the default.
    """

    def __init__(
        self, layers: LocalLayers, default: str, active: Collection[ActiveRequest], counters: Counter[str]
    ) -> None:
        self._active, self._counters = active, counters
        self._pace = Pace(DECODE_TOKENS - 1)
        self._layers = layers
        self._default = default
        #: Number of requests that decode, and of the tokens in their drafts, as far as the present turn has come.
        self._rows = self._drafted = 0
        self.choose(default)

    @property
    def _refused(self) -> str | None:
        """Why no request can speculate; None if they can."""
        if self._layers.indivisible:
            return "its layers give different results for tokens that go through together and one by one"
        return "its layers keep states, which cannot take tokens back" if self._layers.has_states else None

    def choose(self, asked: str | None) -> str:
        """The drafter of a request, `auto` or `off`.

        Args:
            asked: what the request asks for; None for the default.

        Raises:
            ConfigError: there is no such drafter.
            UnsupportedFeature: the model cannot take tokens back.
        """
        name = check_choice(self._default if asked is None else asked)
        if self._refused is None or name == OFF:
            return name
        if name == AUTO:
            return OFF
        raise UnsupportedFeature(f"speculate {name!r} cannot be done with this model, because {self._refused}")

    def choosing(self) -> None:
        """A turn begins in which steps are through. Counts once what every request's next draft depends on."""
        self._rows = sum(not each.awaits_first_token for each in self._active)
        self._drafted = sum(len(each.drafts) for each in self._active)

    def checked(self, checked: Checked) -> None:
        """A request's step is through, and its next tokens are chosen."""
        request, drafted = checked.request, len(checked.request.drafts)
        self._drafted -= drafted
        self._rows += request.awaits_first_token
        if drafted:
            request.generation.drafted_tokens += drafted
            request.generation.accepted_tokens += checked.matched
            self._counters.update({"drafted_tokens": drafted, "accepted_tokens": checked.matched})
        if request.generation.speculate == OFF or request.undivided:
            return
        if request.speculation is None:
            request.speculation = self._pace.start(request.generation.speculate)
            text = request.tokens
            request.last_token = text[-len(checked.tokens) - 1]
            request.speculation.extend(text[-PROMPT_TOKENS:])
        else:
            request.speculation.extend(checked.tokens)
        tokens = [request.last_token, *request.drafts]
        request.speculation.checked(request.step_tokens - drafted, tokens, checked.logits, checked.matched)

    def next_step(self, request: ActiveRequest, tokens: list[int]) -> None:
        """Makes a request's next step of these tokens, and of a draft behind them."""
        request.last_token = tokens[-1]
        if request.speculation is not None:
            # One token more than the draft may be chosen.
            room = request.sampler.remaining(request.generation.tokens) - 1
            limit = min(room, DECODE_TOKENS - len(tokens))
            request.drafts = request.speculation.draft(len(tokens), limit, self._rows, self._drafted)
            self._drafted += len(request.drafts)
        request.step_tokens = len(tokens) + len(request.drafts)
        request.pending.append([*tokens, *request.drafts])

    def stepping(self, begun: Iterable[ActiveRequest]) -> None:
        """Notes what is under way now that the next steps of these requests begin."""
        speculating = [each for each in begun if each.speculation is not None and not each.ended]
        if not speculating:
            return
        stepping = [each for each in self._active if each.step_tokens]
        tokens, drafted = sum(each.step_tokens for each in stepping), any(each.drafts for each in stepping)
        cycle = Cycle(self._pace.clock(), len(stepping), tokens, drafted)
        for request in speculating:
            assert request.speculation is not None
            request.speculation.cycle = cycle

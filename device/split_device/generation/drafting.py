"""Drafts for requests: which ones speculate, what their drafters are told, and how long drafts may be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch

from split_common.engine.scheduler import DECODE_TOKENS
from split_common.errors import ConfigError, UnsupportedFeature
from split_device.generation.active import ActiveRequest
from split_device.generation.ahead import add_steps, draft_ahead
from split_device.generation.checking import Checked
from split_device.generation.draft_model import DraftModel
from split_device.generation.limits import Limits
from split_device.generation.loaded_drafts import DraftSequence, LoadedDrafts
from split_device.generation.local_layers import KV_MEMORY, LocalLayers
from split_device.generation.mtp import MtpDrafts
from split_device.speculation.drafter import Drafter
from split_device.speculation.drafters import TREE_TOKENS, check_choice
from split_device.speculation.names import AUTO, DRAFT, MTP, OFF, draft_model, is_loaded
from split_device.speculation.speculation import Cycle, Pace, Speculation
from split_device.speculation.spine import SpineDrafter

#: How many of a request's first tokens its drafter gets, the last ones. It looks at them on the generator's thread,
#: which all requests share: at most some 12 µs a token, so 0.2 s once.
PROMPT_TOKENS = 16_384


class Drafting:
    """Drafts for the requests of one generator, whose thread uses it; any thread may call `choose`.

    Args:
        model: the split model.
        layers: its head and tail.
        limits: what requests do that leave it open (`speculate`), and the memory of a draft model (`kv_memory`).
        active: the requests that run, as a view.
        counters: counts `drafted_tokens` and `accepted_tokens`.
        tokenizer: the one that is used with the model; None for the one beside it.

    Raises:
        ConfigError, UnsupportedFeature: as `choose`, for the default; or as `DraftModel`.
        SplitError: the draft model cannot be loaded.
    """

    def __init__(
        self,
        model: Any,
        layers: LocalLayers,
        limits: Limits,
        active: Collection[ActiveRequest],
        counters: Counter[str],
        tokenizer: Any = None,
    ) -> None:
        self._active, self._counters = active, counters
        self._pads = bool(model.split_parts.client.pad_steps)
        self._pace = self._model_pace = Pace(TREE_TOKENS - 1, pads=self._pads)
        self._layers = layers
        self._default, self._steps_ahead = limits.speculate, limits.steps_ahead
        #: Drafts for requests that ask for it; None if the default is another drafter.
        self._model: LoadedDrafts[Any] | None = None
        self._sequences: dict[ActiveRequest, DraftSequence] = {}
        #: When the drafts of the present turn were begun, by the pace's clock.
        self._began = 0.0
        #: Number of requests that decode, and of the tokens in their drafts, as far as the present turn has come.
        self._rows = self._drafted = 0
        self.choose(self._default)
        if is_loaded(self._default):
            memory = limits.kv_memory if limits.kv_memory is not None else KV_MEMORY
            if (name := draft_model(self._default)) is None:
                self._model = MtpDrafts(model, layers, memory)
            else:
                self._model = DraftModel(name, model, layers.vocabulary, memory, tokenizer)
            # What its drafts cost says nothing of those of others.
            self._model_pace = Pace(DECODE_TOKENS - 1)

    @property
    def _refused(self) -> str | None:
        """Why no request can speculate; None if they can."""
        if self._layers.indivisible:
            return "its layers give different results for tokens that go through together and one by one"
        return "its layers keep states, which cannot take tokens back" if self._layers.has_states else None

    def choose(self, asked: str | Drafter | None) -> str | Drafter:
        """The drafter of a request or its name, `auto` or `off`.

        Args:
            asked: as `Request.speculate`; None for the default.

        Raises:
            ConfigError: there is no such drafter, or its weights were not loaded.
            UnsupportedFeature: the model cannot take tokens back.
        """
        wanted = self._default if asked is None else asked
        name = check_choice(wanted) if isinstance(wanted, str) else type(wanted).__name__
        if is_loaded(wanted) and name != self._default:
            option = MTP if name == MTP else f"{DRAFT}MODEL"
            raise ConfigError(
                f"speculate {name!r} was not loaded: the process that generates loads such weights when it starts "
                f"with --speculate {option}"
            )
        if self._refused is None or name == OFF:
            return wanted
        if name == AUTO:
            return OFF
        raise UnsupportedFeature(f"speculate {name!r} cannot be done with this model, because {self._refused}")

    def choosing(self) -> None:
        """A turn begins in which steps are through. Counts once what every request's next draft depends on."""
        self._rows = sum(not each.awaits_first_token for each in self._active)
        self._drafted = sum(len(each.drafts) for each in self._active)

    def begun(self, request: ActiveRequest) -> None:
        """A request has begun. If loaded layers draft for it, memory is reserved, and they may read the prompt."""
        if not is_loaded(request.generation.speculate) or request.undivided or request.ended:
            return
        if (speculation := self._start_model(request)) is None:
            # Nobody waits for memory that only drafts need.
            request.generation.speculate = OFF
            return
        request.speculation = speculation
        text = request.tokens
        request.last_token = text[-1]
        request.speculation.extend(text[-PROMPT_TOKENS:])

    def _start_model(self, request: ActiveRequest) -> Speculation | None:
        """Speculation by the draft model, which may read the text; None if there is no memory for that."""
        if self._model is None or (sequence := self._model.begin(request.sampler.max_length)) is None:
            return None
        self._sequences[request] = sequence
        sequence.wanted = self._model_pace.pays
        return Speculation(self._model_pace, SpineDrafter(sequence.predictor), True, lambda: self._ended(request))

    def _ended(self, request: ActiveRequest) -> None:
        if self._model is not None and (sequence := self._sequences.pop(request, None)) is not None:
            self._model.end(sequence)

    def read(self) -> bool:
        """Has the draft model read some tokens of texts, while steps are away. Returns whether there were any."""
        if self._model is None or not self._model.reads:
            return False
        self._model.read()
        return True

    def computed(self, request: ActiveRequest, states: torch.Tensor) -> None:
        """The tail has computed states `[tokens, width]` of a request's next tokens, which MTP layers need."""
        if self._model is not None and (sequence := self._sequences.get(request)) is not None:
            self._model.computed(sequence, states)

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
        if request.speculation is None and is_loaded(request.generation.speculate):
            self.begun(request)
            return
        if request.speculation is None:
            request.speculation = self._pace.start(request.generation.speculate)
            text = request.tokens
            request.last_token = text[-len(checked.tokens) - 1]
            request.speculation.extend(text[-PROMPT_TOKENS:])
        else:
            request.speculation.extend(checked.tokens)
        if self._model is not None and (sequence := self._sequences.get(request)) is not None:
            self._model.chosen(sequence, drafted - checked.matched, len(checked.tokens) - checked.matched)
        tokens = [request.last_token, *request.drafts]
        request.speculation.checked(request.step_tokens - drafted, tokens, checked.logits, checked.matched)

    def next_steps(
        self, going: Sequence[tuple[ActiveRequest, list[int]]]
    ) -> Iterator[tuple[ActiveRequest, Exception | None]]:
        """Makes the next steps of requests.

        Args:
            going: requests, with the tokens that their steps begin with. Drafts come behind them.

        Yields:
            Each request, and why it cannot go on; None if it does.
        """
        self._foresee(going)
        for request, tokens in going:
            try:
                self._next_step(request, tokens)
            except Exception as error:
                yield request, error
            else:
                yield request, None
        self._stepping(request for request, _ in going)

    def _foresee(self, going: Sequence[tuple[ActiveRequest, list[int]]]) -> None:
        """Has the draft model go on with the texts of requests, all at once."""
        self._began = self._pace.clock()
        drafted, asked = self._drafted, []
        for request, tokens in going:
            if (sequence := self._sequences.get(request)) is None or request.speculation is None:
                continue
            limit = request.speculation.plan(len(tokens), _limit(request, tokens), self._rows, drafted)
            drafted += limit
            if limit and sequence.can_begin(len(tokens)):
                asked.append((sequence, limit))
        if self._model is not None:
            self._model.foresee(asked)
            for request, _ in going:
                self._stop_drafts(request, self._model)

    def _stop_drafts(self, request: ActiveRequest, model: LoadedDrafts[Any]) -> None:
        """If the draft model has given up a request's text, the request goes on without drafts, and says so."""
        sequence = self._sequences.get(request)
        if sequence is not None and request.speculation is not None and not model.drafts_for(sequence):
            request.speculation.ended()
            request.speculation, request.generation.speculate = None, OFF

    def _next_step(self, request: ActiveRequest, tokens: list[int]) -> None:
        """Makes a request's next step of these tokens, and of a draft behind them."""
        request.last_token = tokens[-1]
        most = DECODE_TOKENS
        if request.legs:
            # It is away already.
            (_, *request.drafts), *_ = request.legs.steps
        elif self._pace.room is not None and _is_sized(request):
            most = request.room = self._pace.room.tokens
        if request.speculation is not None and not request.legs:
            if request.speculation.branches and self._takes_trees(request):
                tree = request.speculation.tree(_limit(request, tokens, TREE_TOKENS))
                request.drafts, request.parents = tree.tokens, tree.after(len(tokens))
            else:
                limit = _limit(request, tokens, most)
                request.drafts = request.speculation.draft(len(tokens), limit, self._rows, self._drafted)
                request.parents = []
        self._drafted += len(request.drafts)
        request.step_tokens = len(tokens) + len(request.drafts)
        # Steps that nobody waits for would delay those of others.
        most_ahead = self._steps_ahead if len(self._active) == 1 and not request.parents else 0
        ahead = draft_ahead(request, len(tokens), most_ahead)
        self._counters["steps_ahead"] += len(ahead)
        add_steps(request, ahead if request.legs else [[*tokens, *request.drafts], *ahead])

    def _takes_trees(self, request: ActiveRequest) -> bool:
        """Whether a request's next step may have several continuations."""
        return self._layers.takes_trees and request.placed is None and request.session.takes_trees

    def _stepping(self, begun: Iterable[ActiveRequest]) -> None:
        """Notes what is under way now that the next steps of these requests begin."""
        speculating = [each for each in begun if each.speculation is not None and not (each.ended or each.is_away)]
        if not speculating:
            return
        stepping = [each for each in self._active if each.step_tokens]
        tokens, drafted = sum(each.step_tokens for each in stepping), any(each.drafts for each in stepping)
        padding = fixed = 0
        if self._pads:
            padding = sum(max(0, each.room - each.step_tokens) for each in stepping)
            fixed = sum(each.room - 1 for each in stepping if not _is_sized(each))
        cycle = Cycle(self._began, len(stepping), tokens, drafted, padding, fixed)
        for request in speculating:
            assert request.speculation is not None
            request.speculation.cycle = cycle


def _is_sized(request: ActiveRequest) -> bool:
    """Whether its steps are as large as drafts pay for. What a grammar forces may always come in one of them."""
    asked = request.generation
    return asked.speculate == AUTO and asked.request.constraint is None and not request.undivided


def _limit(request: ActiveRequest, tokens: list[int], most: int = DECODE_TOKENS) -> int:
    """Most tokens of a draft behind these tokens, in a step of at most `most`."""
    # One token more than the draft may be chosen.
    room = request.sampler.remaining(request.generation.tokens) - 1
    return min(room, most - len(tokens))

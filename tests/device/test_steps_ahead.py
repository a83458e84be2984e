"""Steps that are sent before the one in front of them is back: the same tokens, whatever was right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from test_generator import alone, greedy, sampling, worker_process

import tiny
from fleet import joined, replaced, running_broker
from split_device.generation import ahead
from split_device.generation.active import ActiveRequest
from split_device.generation.generator import Generator, Request
from split_device.generation.limits import Limits
from split_device.models.flight import Flight, FlyingCacheLayer, Landed, Leg, TripTimes
from split_device.sessions.session import RemoteSession
from split_device.sessions.timings import StepTimings
from split_device.speculation.drafters import DRAFTERS
from wiretap import LATE, wait_until

pytestmark = pytest.mark.usefixtures("patient_queue")

TOKENS = 150


class Known:
    """A drafter that knows the texts, and is wrong in the same places whenever it is asked."""

    def __init__(self, texts: Sequence[Sequence[int]], wrong: Sequence[int] = ()) -> None:
        self._texts, self._wrong = texts, {*wrong}
        self._tokens: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        self._tokens += tokens

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        assert logits.shape == (len(tokens), tiny.VOCABULARY)

    def draft(self, limit: int) -> list[int]:
        here = len(self._tokens)
        (text,) = (text for text in self._texts if [*text[:here]] == self._tokens)
        places = range(here, min(here + limit, len(text)))
        return [(text[at] + (at in self._wrong)) % tiny.VOCABULARY for at in places]


#: Where drafts are wrong: nowhere; the last token of a step, the first one of another; early, so that much is void.
WRONG = {"right": (), "ends": (60, 77, 78, 95, 110), "often": (*range(50, 70, 9), *range(100, 160, 21))}


@pytest.fixture(autouse=True)
def _far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a trip took as long as many steps at the worker."""
    monkeypatch.setattr(ahead, "steps_that_are_free", lambda _, most: most)


def asked() -> list[Request]:
    """Each is alone when it runs. The prompts differ, and no text is a prefix of another one."""
    return [
        Request([3, 17, 17, 33], greedy(TOKENS)),
        Request([4, 17, 17, 33], sampling(TOKENS), seed=11),
        Request([5, 17, 17, 33], sampling(TOKENS, temperature=1.7, top_k=20), seed=12),
        Request([6, 17, 17, 33], greedy(TOKENS, repetition_penalty=1.3), logprobs=2),
    ]


@pytest.fixture(scope="module")
def texts(unsplit: Any) -> list[list[int]]:
    return [[*request.prompt, *alone(unsplit, request)] for request in asked()]


def drafts(monkeypatch: pytest.MonkeyPatch, texts: Sequence[Sequence[int]], wrong: Sequence[int] = ()) -> Limits:
    monkeypatch.setitem(DRAFTERS, "known", lambda _: Known(texts, wrong))
    return Limits(speculate="known", steps_ahead=3)


@pytest.mark.parametrize("wrong", WRONG)
def test_the_tokens_are_the_same(
    split: Any, texts: list[list[int]], wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Generator(split, limits=drafts(monkeypatch, texts, WRONG[wrong])) as generator:
        for request, text in zip(asked(), texts, strict=True):
            assert [*request.prompt, *generator.submit(request).result(LATE)] == text
        counters = generator.counters
    assert counters["steps_ahead"] > 8
    assert (counters["stale_tokens"] > 0) == (wrong != "right")


def test_none_is_sent_ahead_if_that_is_off_or_others_run(
    split: Any, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = drafts(monkeypatch, texts)
    with Generator(split, limits=limits.but(steps_ahead=0)) as generator:
        assert [*asked()[0].prompt, *generator.submit(asked()[0]).result(LATE)] == texts[0]
        assert generator.counters["steps_ahead"] == 0
    with Generator(split, limits=limits) as generator:
        generations = [generator.submit(request) for request in asked()]
        for generation, text in zip(generations, texts, strict=True):
            assert [*generation.request.prompt, *generation.result(LATE)] == text


def test_a_text_that_ends_while_steps_are_away_is_kept(
    split: Any, unsplit: Any, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, text = asked()[0].prompt, texts[0]
    end = next(token for at, token in enumerate(text) if at > 80 and token not in text[:at])
    short = text[: text.index(end) + 1]
    with Generator(split, limits=drafts(monkeypatch, texts)) as generator:
        first = generator.submit(Request(prompt, greedy(TOKENS, eos_token_id=end)))
        assert ([*prompt, *first.result(LATE)], first.finish_reason) == (short, "stop")
        # It is kept once all of its steps are back.
        wait_until(lambda: not generator._requests._leaving)
        longer = Request([*short, 8, 9], greedy(12), speculate="off")
        later = generator.submit(longer)
        assert later.result(LATE) == alone(unsplit, longer)
        assert later.cached_tokens >= len(short) - 1


def test_a_request_that_is_cancelled_while_steps_are_away(
    split: Any, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Generator(split, limits=drafts(monkeypatch, texts)) as generator:
        for _ in range(3):
            generation = generator.submit(asked()[0])
            coming = iter(generation)
            tokens = [next(coming) for _ in range(70)]
            generation.cancel()
            tokens += coming
            assert [*asked()[0].prompt, *tokens] == texts[0][: 4 + len(tokens)]
        assert [*asked()[1].prompt, *generator.submit(asked()[1]).result(LATE)] == texts[1]
    assert not generator._active


class Strike:
    """Does something once, when a request has this many steps away. None is at its worker before that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, away: int) -> None:
        self.act: Any = None
        send = ActiveRequest.send

        def sending(request: ActiveRequest, states: torch.Tensor) -> bool:
            sent = send(request, states)
            if request.legs is not None and request.legs.away >= away and self.act is not None:
                act, self.act = self.act, None
                act()
            return sent

        fly = ActiveRequest._fly

        def flying(request: ActiveRequest, leg: Leg, on_output: Any) -> Landed:
            legs = request.legs
            assert legs is not None
            # Else a fast worker may have answered each before the next one leaves.
            wait_until(lambda: legs.away >= min(away, len(legs)))
            return fly(request, leg, on_output)

        monkeypatch.setattr(ActiveRequest, "send", sending)
        monkeypatch.setattr(ActiveRequest, "_fly", flying)


@pytest.mark.parametrize("wrong", ["right", "often"])
def test_a_worker_that_is_lost_with_two_steps_away(
    transport: str, wrong: str, checkpoint: Path, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    strike = Strike(monkeypatch, 2)
    with (
        running_broker() as broker,
        joined(broker.address, checkpoint) as (model, worker),
        Generator(model, limits=drafts(monkeypatch, texts, WRONG[wrong])) as generator,
        replaced(worker, checkpoint, broker.address, lambda: True) as replace,
    ):
        for request, text in zip(asked()[:2], texts, strict=False):
            strike.act = replace
            assert [*request.prompt, *generator.submit(request).result(LATE)] == text
        assert strike.act is None
        assert model.traffic["replays"] > 0


@pytest.mark.long
def test_a_worker_that_is_killed_with_two_steps_away(
    checkpoint: Path, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from split_device import SplitModelForCausalLM

    strike = Strike(monkeypatch, 2)
    with (
        running_broker() as broker,
        worker_process(checkpoint, broker.address) as first,
        SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address) as model,
        Generator(model, limits=drafts(monkeypatch, texts, WRONG["ends"])) as generator,
    ):
        assert [*asked()[0].prompt, *generator.submit(asked()[0]).result(LATE)] == texts[0]
        with worker_process(checkpoint, broker.address):
            strike.act = first.kill
            assert [*asked()[1].prompt, *generator.submit(asked()[1]).result(LATE)] == texts[1]
            assert strike.act is None
            assert model.traffic["replays"] > 0


def flight_of(*legs: Leg) -> Flight:
    """A flight of these legs, each one message, which is its start. It has boarded a session."""
    coming = [*legs]

    def encoded(leg: Leg, _: StepTimings) -> Any:
        def request(*_: Any) -> Any:
            return leg.start, b""

        return None, [(SimpleNamespace(request=request, output=lambda *_: torch.zeros(leg.tokens, 2)), b"")]

    layer = SimpleNamespace(encoded=encoded, land=lambda _: None)
    flight = Flight(cast("Any", layer), lambda: coming.pop(0) if coming else None, lambda *_: None)
    channel = SimpleNamespace(pads=True, takes_trees=True)
    flight.board(cast("Any", SimpleNamespace(channel=channel, brief=False)), StepTimings())
    return flight


def starts(requests: Any) -> list[Any]:
    """Takes all messages: where their legs start."""
    taken = iter(lambda: requests.take(False), None)
    return [start for start, _ in taken]


def test_steps_that_are_void_are_not_sent_again() -> None:
    """A worker that has refused one would refuse it again, and the right step would never run."""
    *void, right = legs = [Leg(10, 16, False, 16), Leg(26, 16, False, 16), Leg(5, 2, True, 16)]
    flight = flight_of(*legs)
    assert starts(flight.requests()) == [10, 26, 5]
    for leg in reversed(void):
        leg.void = True
    requests = flight.requests()
    assert not requests.complete
    assert starts(requests) == [5]
    assert (flight.lost, flight.taken) == ([right], 3)
    requests.answered(0, cast("Any", (None, b"")))
    assert requests.complete
    assert (flight.lost, flight.through) == ([], 1)


def test_a_refusal_spoils_a_session_only_if_others_were_behind_it() -> None:
    flight = flight_of(*(Leg(start, 16, False, 16) for start in (0, 16, 32)))
    step = cast("Any", SimpleNamespace(parts=flight))
    requests = flight.requests()
    assert starts(requests) == [0, 16, 32]
    # The second one is refused: the third one may have run.
    requests.answered(0, cast("Any", (None, b"")))
    assert FlyingCacheLayer.is_spoilt(cast("Any", None), step)
    # The third one is.
    requests.answered(1, cast("Any", (None, b"")))
    assert not FlyingCacheLayer.is_spoilt(cast("Any", None), step)


def test_a_step_that_becomes_void_while_its_thread_looks_is_not_waited_for(
    split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([False])

    class Vanishing:
        """There is a request until one looks again."""

        growing = False
        complete = property(lambda _: next(looks, True))

        def take(self, wait: bool) -> None:
            assert wait, "all is answered"

    session = split.split_parts.client.open_session()
    monkeypatch.setattr(RemoteSession, "_next_event", lambda *_: pytest.fail("nothing is in flight"))
    assert session.stream(Vanishing(), StepTimings()) == []
    session.close()


@pytest.mark.parametrize(
    ("trips", "worker", "steps"),
    [([0.2], 0.05, 3), ([0.08], 0.05, 1), ([0.08], 0.09, 0), ([0.5, 0.001], 0.0001, 0), ([], 0.01, 0)],
)
def test_how_many_steps_are_free(
    trips: list[float], worker: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the worker does within the fastest trip; none on one machine."""
    monkeypatch.undo()
    times = TripTimes()
    for trip in [*trips, None]:
        times.add(trip, worker)
    assert ahead.steps_that_are_free(times, 3) == steps

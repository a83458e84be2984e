"""Measures what decides how fast a split model generates: round trip, bandwidth, steps, codecs, and a sample."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from split_common.engine.scheduler import DECODE_TOKENS
from split_common.errors import MeasurementTimeout, SplitError, UnsupportedFeature
from split_common.models.codecs import CODECS, EXACT
from split_common.models.tensors import usual_states
from split_device.generation.branching import answered
from split_device.generation.cycles import GLANCE, Cycles, CycleSample, Spread
from split_device.generation.generator import Generator, Logprobs, Request
from split_device.generation.measured import CodecCost, Measured, TreeCost, line
from split_device.generation.settings import NO_END
from split_device.models.cache import SessionCacheLayer
from split_device.models.prepared import StepContext
from split_device.speculation.drafters import DRAFTERS, TREE_TOKENS, TREES, make_drafter
from split_device.speculation.forecast import SampleText
from split_device.speculation.names import AUTO, OFF
from split_device.speculation.recycle import Successors

#: Tokens of a step that are measured, by how many sessions are at once.
STEPS: Mapping[int, tuple[int, ...]] = {1: (1, 2, 4, 8, 16), 2: (1, 16), 4: (1, 16), 8: (1, 8), 16: (1, 4)}

#: Tokens of a step that are measured with each codec.
CODEC_STEPS = (1, 16)

#: Cycles of a stretch that count, and fewest and most stretches of each size.
CYCLES = 3
ROUNDS = (2, 8)

#: Seconds that the cycles of one number of sessions should take, and what a part may take.
SECONDS = 5.0
LIMIT = 90.0

#: The same as `CYCLES` and `ROUNDS`, of each codec, which has a fifth of the seconds.
CODEC_CYCLES, CODEC_ROUNDS = 2, (2, 4)

#: Bytes of the messages that measure the bandwidth, and how often they are sent: TCP takes some to become fast.
LARGE, LARGE_TIMES = 256 * 1024, 5

#: Tokens of each answer of the sample, and how many likely ones are kept of each place.
SAMPLE_TOKENS = 64
LIKELY = 16

#: How often a drafter is timed.
LEARN_TIMES = 5

#: Numbers of sessions for which drafts of several continuations are measured.
TREE_SESSIONS = (1, 2, 4)

#: Stages of a step that a codec's own computation takes, on the device and on the worker.
CODEC_STAGES = ("encode", "decode", "worker")
WORKER_STAGES = ("body", "worker")
DEVICE_STAGES = ("head", "encode", "encrypt", "decrypt", "decode", "tail", "sampling")


class Ping:
    """Measures a model that nobody else uses meanwhile.

    Args:
        model: a model made by `SplitModelForCausalLM.from_pretrained`, with codec `exact`.
        prompts: the sample's prompts as token ids.
        ends: tokens that end an answer.
        say: takes a line of text when another part begins.
        seconds: how long the cycles of one number of sessions should take; at least two stretches of each size run.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        ends: Iterable[int],
        say: Callable[[str], None],
        seconds: float = SECONDS,
    ) -> None:
        self._seconds = seconds
        self._model, self._prompts, self._ends, self._say = model, prompts, sorted(ends), say
        self._client = model.split_parts.client

    def measure(self) -> Measured:
        """Measures all parts.

        Raises:
            MeasurementTimeout: a part took too long.
            SplitError: there is no worker, or it failed.
        """
        notes: list[str] = []
        with Generator(self._model, prefix_cache=0, speculate=OFF) as generator:
            self._say("the sample")
            texts = self._sample(generator)
            drafts = _can_draft(generator, self._prompts[0])
            cycles = Cycles(self._model, generator, self._prompts)
            plain, every = {}, {}
            for sessions in STEPS:
                self._say(
                    "round trip, and steps of one session" if sessions == 1 else f"steps of {sessions} sessions"
                )
                if found := self._cycles(cycles, sessions, None, notes):
                    plain[sessions] = found
                if drafts and found and (found := self._cycles(cycles, sessions, STEPS[sessions], notes)):
                    every[sessions] = found
            self._say("bandwidth")
            up, down = self._bandwidth(notes)
            self._say("codecs")
            plain_codecs = self._codecs(cycles, None, notes)
            codecs = self._codecs(cycles, CODEC_STEPS, []) if drafts else {}
            tree_cycles = self._tree_cycles(cycles, notes) if drafts else {}
        trees = self._trees(tree_cycles, texts)
        single = every[1] if drafts else plain[1]
        return Measured(
            _spread(plain[1], lambda sample: sample.stages["queue"])[1],
            up,
            down,
            drafts,
            bool(self._client.pad_steps),
            _spread(single, lambda sample: sum(sample.stages[stage] for stage in WORKER_STAGES)),
            _spread(single, lambda sample: sum(sample.stages[stage] for stage in DEVICE_STAGES)),
            {sessions: _spread(found, _cycle_seconds) for sessions, found in plain.items()},
            {sessions: _spread(found, _cycle_seconds) for sessions, found in every.items()},
            trees,
            plain_codecs,
            codecs,
            {name: _learning(name, texts[0]) for name in DRAFTERS if name not in TREES} if drafts else {},
            texts,
            notes,
        )

    # --- the sample ----------------------------------------------------------------------------------------

    def _sample(self, generator: Generator) -> list[SampleText]:
        """The model's own answers. Raises UnsupportedFeature if all of them are too short."""
        vocabulary = int(self._model.config.get_text_config(decoder=True).vocab_size)
        expected: list[list[list[tuple[int, float]]]] = [[] for _ in self._prompts]

        def note(index: int) -> Callable[[int, Logprobs | None, bytes | None], None]:
            return lambda _token, logprobs, _state: expected[index].append(logprobs.top if logprobs else [])

        config = GenerationConfig(
            do_sample=False, max_new_tokens=SAMPLE_TOKENS, eos_token_id=self._ends or [NO_END], pad_token_id=0
        )
        running = []
        try:
            for index, prompt in enumerate(self._prompts):
                request = Request(list(prompt), config, logprobs=LIKELY, speculate=AUTO)
                running.append(generator.submit(request, note(index)))
            until = time.monotonic() + LIMIT * len(running)
            while not all(generation.done for generation in running):
                if time.monotonic() > until:
                    raise MeasurementTimeout(f"{len(running)} short answers took longer than {LIMIT:.0f} s each")
                time.sleep(GLANCE)
            answers = [generation.result() for generation in running]
        finally:
            for generation in running:
                generation.cancel()
        texts = [
            SampleText(list(prompt), answer, places, vocabulary)
            for prompt, answer, places in zip(self._prompts, answers, expected, strict=True)
            if len(answer) > 1
        ]
        if not texts:
            raise UnsupportedFeature("the model's answers to the sample have one token each: give another --sample")
        return texts

    # --- steps ---------------------------------------------------------------------------------------------

    def _cycles(
        self,
        cycles: Cycles,
        sessions: int,
        lengths: Sequence[int] | None,
        notes: list[str],
        branches: bool = False,
    ) -> list[CycleSample]:
        """Cycles of so many sessions; empty, with a note, if there cannot be several."""
        seconds = self._seconds if lengths and not branches else self._seconds / 4
        try:
            return cycles.measure(sessions, lengths, CYCLES, ROUNDS, seconds, LIMIT, sessions == 1, branches)
        except SplitError as error:
            if sessions == 1:
                raise
            notes.append(f"{sessions} sessions: {error}")
            return []

    def _tree_cycles(self, cycles: Cycles, notes: list[str]) -> dict[int, dict[int, Spread]]:
        """Cycles of steps with several continuations, by the number of sessions; empty if there cannot be such."""
        self._say("steps of several continuations")
        found: dict[int, dict[int, Spread]] = {}
        for sessions in TREE_SESSIONS:
            samples = self._cycles(cycles, sessions, (TREE_TOKENS,), notes, branches=True)
            if not samples:
                break
            found[sessions] = _spread(samples, _cycle_seconds)
        return found

    def _trees(self, cycles: dict[int, dict[int, Spread]], texts: Sequence[SampleText]) -> TreeCost | None:
        if 1 not in cycles:
            return None
        answers = {}
        for name in TREES:
            self._say(f"the sample by {name}")
            answers[name] = answered(self._model, texts, name, LIMIT)
        return TreeCost(cycles, answers)

    # --- the network ---------------------------------------------------------------------------------------

    def _bandwidth(self, notes: list[str]) -> tuple[Spread | None, Spread | None]:
        """Bits per second to the worker and back, by messages of two sizes: the fastest, and all of them."""
        parts = self._model.split_parts
        states = usual_states(int(parts.stack.width), self._model.dtype)
        tokens = max(2, min(LARGE // states.nbytes, parts.max_positions // 2))
        session = SessionCacheLayer(parts.client, parts.traits, adapter=parts.adapters.active_request)
        try:
            with _limited(session):
                small = [self._trip(session, states[None, None], None) for _ in range(LARGE_TIMES)]
                sizes = [self._trip(session, states.expand(1, tokens, -1), 1) for _ in range(LARGE_TIMES)]
                both = [self._trip(session, states.expand(1, tokens, -1), None) for _ in range(LARGE_TIMES)]
        except SplitError as error:
            notes.append(f"bandwidth: {error}")
            return None, None
        finally:
            session.reset()
        least = min(seconds for seconds, _, _ in small)
        up = [(seconds - least, sent) for seconds, sent, _ in sizes]
        fastest = min(seconds for seconds, _ in up)
        down = [(seconds - least - fastest, received) for seconds, _, received in both]
        return _rate(up), _rate(down)

    def _trip(self, session: SessionCacheLayer, states: torch.Tensor, last: int | None) -> tuple[float, int, int]:
        """Seconds that a step spends outside device and worker, and bytes to the worker and back."""
        session.crop(1 if session.get_seq_length() else 0)
        context, before = StepContext(last=last), self._model.traffic
        session.step(states, context)
        after = self._model.traffic
        sent, received = (after[key] - before[key] for key in ("bytes_sent", "bytes_received"))
        return context.timings.seconds["queue"], sent, received

    # --- codecs --------------------------------------------------------------------------------------------

    def _codecs(self, cycles: Cycles, lengths: Sequence[int] | None, notes: list[str]) -> dict[str, CodecCost]:
        found: dict[str, list[CycleSample]] = {}
        for name in CODECS:
            try:
                with self._codec(name):
                    found[name] = cycles.measure(
                        1, lengths, CODEC_CYCLES, CODEC_ROUNDS, self._seconds / 5, LIMIT, True
                    )
            except UnsupportedFeature as error:
                notes.append(f"codec {name}: {error}")
        exact = _spread(found[EXACT], _codec_seconds)
        return {name: _cost(samples, exact) for name, samples in found.items()}

    @contextmanager
    def _codec(self, name: str) -> Iterator[None]:
        """Has steps encoded by another codec. The model has no session meanwhile that began with another one."""
        before, self._client.codec = self._client.codec, CODECS[name]
        try:
            yield
        finally:
            self._client.codec = before


def _can_draft(generator: Generator, prompt: list[int]) -> bool:
    """Whether the model can take tokens back. That its worker cannot is known after a first request."""
    try:
        generator.submit(Request(list(prompt), speculate="ngram")).cancel()
    except UnsupportedFeature:
        return False
    return True


@contextmanager
def _limited(session: SessionCacheLayer) -> Iterator[None]:
    """Gives a session up if a block takes too long. Raises MeasurementTimeout then."""
    timer = threading.Timer(LIMIT, session.abandon)
    timer.start()
    began = time.monotonic()
    try:
        yield
    except SplitError:
        if time.monotonic() - began >= LIMIT:
            raise MeasurementTimeout(f"the answers took longer than {LIMIT:.0f} s") from None
        raise
    finally:
        timer.cancel()


def _spread(samples: Sequence[CycleSample], quantity: Callable[[CycleSample], float]) -> dict[int, Spread]:
    """A quantity by the tokens of a step, in ascending order."""
    return {
        tokens: Spread.of([quantity(sample) for sample in samples if sample.tokens == tokens])
        for tokens in sorted({sample.tokens for sample in samples})
    }


def _cycle_seconds(sample: CycleSample) -> float:
    return sample.seconds


def _rate(samples: Sequence[tuple[float, int]]) -> Spread | None:
    """Bits per second of messages that took so many seconds longer than small ones; None if they took no longer.

    The median is that of the faster half: the slower ones find out how fast the network is.
    """
    rates = sorted(8 * size / seconds for seconds, size in samples if seconds > 1e-4)
    if 2 * len(rates) < len(samples):
        return None
    fast = rates[len(rates) // 2 :]
    return Spread(statistics.fmean(fast), statistics.median(fast), rates[0], rates[-1], len(rates))


def _codec_seconds(sample: CycleSample) -> float:
    return sum(sample.stages[stage] for stage in CODEC_STAGES)


def _cost(samples: Sequence[CycleSample], exact: Mapping[int, Spread]) -> CodecCost:
    mine = _spread(samples, _codec_seconds)
    message, token = line({tokens: spread.median - exact[tokens].median for tokens, spread in mine.items()})
    up, down = (
        {tokens: spread.median for tokens, spread in _spread(samples, way).items()}
        for way in (lambda sample: sample.up, lambda sample: sample.down)
    )
    return CodecCost(message, token, up, down)


def _learning(name: str, text: SampleText) -> float:
    """Seconds that a drafter takes to learn from a token, in steps of the most tokens."""
    logits = text.logits(0, 1).expand(DECODE_TOKENS, -1).contiguous()
    drafter = make_drafter(name, Successors())
    took = []
    for first in range(LEARN_TIMES):
        began = time.perf_counter()
        drafter.learn(range(first, first + DECODE_TOKENS), logits)
        took.append(time.perf_counter() - began)
    return statistics.median(took) / DECODE_TOKENS

"""Generation across a network with a round trip of 0, 20, 80 and 200 ms and 100 Mbit/s.

Broker and worker are in one network namespace, the device is in another. Between the two, `benchmarks.forwarder`
delays, limits and loses IP packets. Needs root, for the namespaces alone.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import arguments, checkpoint, decoded_together, exact_request, note, report
from benchmarks.network import Network
from benchmarks.prompts import KINDS, PROMPTS, encoded_prompt, prompts
from split_common.models.checkpoint import Checkpoint
from split_common.models.verification import build_manifest
from split_common.system.process import passive_threads, running_command
from split_common.trust.fleet import Fleet

#: Milliseconds of a round trip, and those of which the share of the bound counts.
RTTS = (0, 20, 80, 200)
FAR = (80, 200)

#: Bits per second.
RATE = 100e6

#: Share of packets lost in `tok_s_lossy`, and the milliseconds of a round trip there.
LOSS, LOSSY_RTT = 0.01, 80

#: Tokens of the prompts whose first token is waited for.
LENGTHS = (128, 512, 2048)

#: Seconds without traffic before such a prompt: a person thinks, and TCP forgets how fast the network is.
PAUSE = 2.0

#: Sessions at once in `sessions16_tok_s`, and milliseconds of a round trip there.
SESSIONS, SESSIONS_RTTS = 16, (0, 80)

#: How the device speculates: with drafters that learn nothing of one prompt's answer for the next one.
SETTINGS = ("off", "ngram", "auto")

#: The drafter whose trees `tokens_per_round_trip` counts.
TREES = "suffix-recycle"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="few prompts, rounds and tokens")
    parser.add_argument("--tokens", type=int, help="tokens of each answer; default: 64, or 8 with --quick")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens of prompts for ttft_ms")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="drafters that stream, e.g. off,auto")
    parser.add_argument("--only", default="", help="parts to measure, e.g. first,ttft; default: all")
    parser.add_argument(
        "--no-pad-steps", dest="pad_steps", action="store_false", help="let sizes follow the tokens of steps"
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts, and of the packets that are lost")
    options = parser.parse_args()
    passive_threads()
    report(measure(options), options.json, "across a network of 100 Mbit/s")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All parts, or those of `--only`; the keys are listed in docs/benchmarks.md."""
    model = checkpoint(options)
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network(options.seed))
        link = stack.enter_context(fleet_across(model, network))
        stack.enter_context(network.inside("near"))
        wan = Wan(model, network, link, options)
        results: dict[str, Any] = {}
        parts = {"first": wan.first, "streams": wan.streams, "ttft": wan.ttft, "sessions": wan.sessions}
        parts["trips"] = wan.trips
        for name in filter(None, options.only.split(",")) if options.only else parts:
            results |= parts[name]()
    return results


@contextlib.contextmanager
def fleet_across(model: Path, network: Network) -> Iterator[dict[str, Any]]:
    """Runs a broker and a worker at the far end; yields a device's arguments to reach them."""
    with tempfile.TemporaryDirectory(prefix="lambda-split-wan-") as directory, contextlib.ExitStack() as stack:
        keys = Path(directory) / "keys"
        Fleet.create(keys).add_manifest(build_manifest(Checkpoint.resolve(str(model))))
        with network.inside("far"):
            bind = f"tcp://{network.address('far')}:*"
            _, broker = stack.enter_context(running_command(["broker", "--bind", bind, "--keys", str(keys)]))
            queue = ["--broker", broker["address"], "--keys", str(keys)]
            worker = ["worker", "--model", str(model), "--layers", "2:-2", "--dtype", "float32", *queue]
            stack.enter_context(running_command(worker))
        yield {"broker": broker["address"], "keys": keys}


@dataclass
class Stream:
    """One answer: its tokens, and seconds and steps from its first token to its last one."""

    tokens: list[int]
    seconds: float
    steps: int
    #: IP bytes to the worker and back, headers included.
    up: int
    down: int


class Wan:
    """The device's end. Measures one thing after another."""

    def __init__(self, model: Path, network: Network, link: dict[str, Any], options: argparse.Namespace) -> None:
        self._model = model
        self._network = network
        self._link = link
        self._draw = random.Random(options.seed)
        self._tokens = options.tokens or (8 if options.quick else 64)
        self._prompts = 1 if options.quick else PROMPTS
        self._rounds = 1 if options.quick else 5
        self._rtts = (0, 80) if options.quick else RTTS
        self._lengths = [int(length) for length in options.lengths.split(",")]
        self._settings = options.settings.split(",")
        self._pads = options.pad_steps

    # --- one stream ----------------------------------------------------------------------------------------

    def streams(self) -> dict[str, Any]:
        """One answer at a time, of each kind, at each round trip."""
        cells: dict[tuple[int, str, str], list[Stream]] = defaultdict(list)
        lossy: dict[tuple[str, str], list[Stream]] = defaultdict(list)
        identical = True
        with self._device() as split, contextlib.ExitStack() as stack:
            asked = self._encoded(split)
            generators = {each: stack.enter_context(self._generator(split, each)) for each in self._settings}
            self._weather(0)
            for generator in generators.values():
                self._stream(generator, asked[KINDS[0]][0])  # warm
            for kind in KINDS:
                for prompt in asked[kind]:
                    for rtt in self._rtts:
                        self._weather(rtt)
                        for setting, generator in generators.items():
                            cells[rtt, kind, setting].append(self._stream(generator, prompt))
                    self._weather(LOSSY_RTT, LOSS)
                    for setting, generator in generators.items():
                        lossy[kind, setting].append(self._stream(generator, prompt))
                for setting in generators:
                    note(f"{kind}, {setting}: {_rates(cells, kind, setting)}")
        answers: dict[tuple[str, int], list[int]] = {}
        for (_, kind, _), streams in cells.items():
            for index, stream in enumerate(streams):
                identical &= answers.setdefault((kind, index), stream.tokens) == stream.tokens
        return {
            "tok_s": {
                str(rtt): {kind: {s: _rate(cells[rtt, kind, s]) for s in self._settings} for kind in KINDS}
                for rtt in self._rtts
            },
            "tok_s_lossy": {kind: {s: _rate(lossy[kind, s]) for s in self._settings} for kind in KINDS},
            "tokens_per_trip": {
                kind: {s: _per_step(cells[self._rtts[-1], kind, s]) for s in self._settings} for kind in KINDS
            },
            "bound_tok_s": {
                str(rtt): {
                    kind: {s: _bound(cells[rtt, kind, s], cells[0, kind, s], rtt / 1000) for s in self._settings}
                    for kind in KINDS
                }
                for rtt in self._rtts
                if rtt in FAR
            },
            "share_of_bound": min(
                _share(cells[rtt, kind, setting], cells[0, kind, setting], rtt / 1000)
                for rtt, kind, setting in cells
                if rtt in FAR
            ),
            "bytes_per_token": {
                setting: _bytes_per_token([s for kind in KINDS for s in cells[80, kind, setting]])
                for setting in self._settings
            },
            "identical": identical,
        } | self._auto_over_off(cells)

    def _auto_over_off(self, cells: Mapping[tuple[int, str, str], Sequence[Stream]]) -> dict[str, float]:
        """What `auto` gains at least, of all kinds and round trips, if both were measured."""
        if not {"auto", "off"} <= {*self._settings}:
            return {}
        cases = {(rtt, kind) for rtt, kind, _ in cells}
        return {"auto_over_off": min(_rate(cells[*case, "auto"]) / _rate(cells[*case, "off"]) for case in cases)}

    def _stream(self, generator: Any, prompt: Sequence[int]) -> Stream:
        steps = generator.counters["steps"]
        arrived = iter(generator.submit(exact_request(prompt, self._tokens)))
        tokens = [next(arrived)]
        before, began = self._network.passed(), time.perf_counter()
        tokens += arrived
        seconds, after = time.perf_counter() - began, self._network.passed()
        up, down = (after[way]["bytes"] - before[way]["bytes"] for way in ("up", "down"))
        # All but the prompt's step.
        steps = generator.counters["steps"] - steps - 1
        return Stream(tokens, seconds, steps, up, down)

    def trips(self) -> dict[str, Any]:
        """Tokens of a step with a fixed budget: trees of 32 tokens, by a drafter that is not trained.

        The round trip does not matter, so there is none.
        """
        found: dict[str, list[Stream]] = {}
        plain: dict[str, list[Stream]] = {}
        self._weather(0)
        with (
            self._device() as split,
            self._generator(split, TREES) as generator,
            self._generator(split, "off") as reference,
        ):
            for kind, asked in self._encoded(split).items():
                found[kind] = [self._stream(generator, prompt) for prompt in asked]
                plain[kind] = [self._stream(reference, prompt) for prompt in asked]
                note(f"{kind}: {_per_step(found[kind]):.2f} tokens in a round trip")
        return {
            "tokens_per_round_trip": {kind: _per_step(streams) for kind, streams in found.items()},
            "trees_identical": all(
                one.tokens == other.tokens
                for kind, streams in found.items()
                for one, other in zip(streams, plain[kind], strict=True)
            ),
        }

    # --- the first token -----------------------------------------------------------------------------------

    def first(self) -> dict[str, Any]:
        """The first request of a device that has just loaded its model, as commands load it, and its second one."""
        firsts: dict[str, float] = {}
        seconds: dict[str, float] = {}
        for rtt in self._rtts:
            both = []
            self._weather(rtt)
            for _ in range(self._rounds):
                with self._device() as split, self._generator(split, "off") as generator:
                    split.warm_up()
                    time.sleep(PAUSE)
                    both.append([self._first_token(generator, 16) for _ in range(2)])
            firsts[str(rtt)], seconds[str(rtt)] = map(statistics.median, zip(*both, strict=True))
        note(f"first request of a device: {firsts}, second one: {seconds}")
        return {"first_request_ms": firsts, "second_request_ms": seconds}

    def ttft(self) -> dict[str, Any]:
        """Times to the first token, over a round trip and the longer one of transfer and computation."""
        times: dict[str, dict[str, float]] = defaultdict(dict)
        ratios: dict[str, dict[str, float]] = defaultdict(dict)
        with self._device() as split, self._generator(split, "off") as generator:
            for length in self._lengths:
                self._weather(0)
                self._first_token(generator, length)  # warm
                measured: dict[int, list[tuple[float, float]]] = defaultdict(list)
                for _ in range(self._rounds):
                    self._network.set(delay=0.0, rate=0.0, loss=0.0)
                    compute = self._first_token(generator, length)
                    for rtt in self._rtts:
                        self._weather(rtt)
                        before = self._network.passed()
                        took = self._first_token(generator, length)
                        after = self._network.passed()
                        # Both ways are used at once.
                        most = max(after[way]["bytes"] - before[way]["bytes"] for way in ("up", "down"))
                        transfer = 1000 * 8 * most / RATE
                        measured[rtt].append((took, took / (rtt + max(transfer, compute))))
                for rtt, pairs in measured.items():
                    took, ratio = map(statistics.median, zip(*pairs, strict=True))
                    times[str(rtt)][str(length)], ratios[str(rtt)][str(length)] = took, ratio
                    note(f"first token after {length} tokens, {rtt} ms: {took:.0f} ms, ratio {ratio:.2f}")
        return {"ttft_ms": dict(times), "ttft_ratio": dict(ratios)}

    def _first_token(self, generator: Any, length: int) -> float:
        """Milliseconds to the first token after a fresh prompt, which comes after a pause."""
        time.sleep(PAUSE)
        prompt = [self._draw.randrange(20, 90) for _ in range(length)]
        began = time.perf_counter()
        (_,) = generator.submit(exact_request(prompt, 1))
        return 1000 * (time.perf_counter() - began)

    # --- many sessions -------------------------------------------------------------------------------------

    def sessions(self) -> dict[str, Any]:
        """Tokens per second of 16 requests at once, while all of them decode."""
        rates: dict[int, list[float]] = defaultdict(list)
        with self._device() as split, self._generator(split, "off") as generator:
            asked = [
                prompt for some in zip(*self._encoded(split, SESSIONS).values(), strict=True) for prompt in some
            ]
            for _ in range(1 + self._rounds):
                for rtt in SESSIONS_RTTS:
                    self._weather(rtt)
                    rates[rtt].append(self._many(generator, asked[:SESSIONS]))
        # The first round warms up.
        medians = {str(rtt): statistics.median(found[1:]) for rtt, found in rates.items()}
        note(f"{SESSIONS} sessions, tokens/s: {medians}")
        return {"sessions16_tok_s": medians}

    def _many(self, generator: Any, asked: Sequence[Sequence[int]]) -> float:
        """Tokens per second from when all requests decode until the first one ends."""
        times: list[list[float]] = [[] for _ in asked]
        tokens = 2 * self._tokens
        generations = [
            generator.submit(exact_request(prompt, tokens), lambda *_, mine=mine: mine.append(time.perf_counter()))
            for prompt, mine in zip(asked, times, strict=True)
        ]
        for generation in generations:
            for _ in generation:
                pass
        counted, seconds = decoded_together(times)
        return counted / seconds if seconds > 0 else 0.0

    # --- the device ----------------------------------------------------------------------------------------

    def _weather(self, rtt: int, loss: float = 0.0) -> None:
        """Sets the milliseconds of a round trip, and the share of packets that are lost."""
        self._network.set(delay=rtt / 2000, rate=RATE, loss=loss)

    def _device(self) -> Any:
        from split_device import SplitModelForCausalLM

        return SplitModelForCausalLM.from_pretrained(
            self._model, head_layers=2, tail_layers=2, dtype="float32", pad_steps=self._pads, **self._link
        )

    @staticmethod
    def _generator(split: Any, setting: str) -> Any:
        from split_device.generation.generator import Generator
        from split_device.generation.limits import Limits

        return Generator(split, limits=Limits(prefix_cache=0, speculate=setting))

    def _encoded(self, split: Any, count: int | None = None) -> dict[str, list[list[int]]]:
        """Prompts of each kind as token ids, at most as many as leave room for the answer."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._model)
        room = split.split_parts.max_positions - 2 * self._tokens
        return {
            kind: [encoded_prompt(tokenizer, text)[-room:] for text in some]
            for kind, some in prompts(count or self._prompts).items()
        }


def _rate(streams: Sequence[Stream]) -> float:
    """Tokens per second after the first tokens."""
    return sum(len(stream.tokens) - 1 for stream in streams) / sum(stream.seconds for stream in streams)


def _rates(cells: dict[tuple[int, str, str], list[Stream]], kind: str, setting: str) -> str:
    found = {rtt: _rate(streams) for (rtt, *of), streams in cells.items() if of == [kind, setting]}
    return ", ".join(f"{rate:.1f} tokens/s at {rtt} ms" for rtt, rate in found.items())


def _per_step(streams: Sequence[Stream]) -> float:
    """Tokens of a step, after the first ones."""
    return sum(len(stream.tokens) - 1 for stream in streams) / sum(stream.steps for stream in streams)


def _bound(streams: Sequence[Stream], near: Sequence[Stream], rtt: float) -> float:
    """Tokens per second of one step at a time: its tokens, over a round trip and a step at 0 ms, both measured."""
    step = sum(stream.seconds for stream in near) / sum(stream.steps for stream in near)
    return _per_step(streams) / (rtt + step)


def _share(streams: Sequence[Stream], near: Sequence[Stream], rtt: float) -> float:
    """Tokens per second over the bound."""
    return _rate(streams) / _bound(streams, near, rtt)


def _bytes_per_token(streams: Sequence[Stream]) -> dict[str, float]:
    tokens = sum(len(stream.tokens) - 1 for stream in streams)
    return {way: sum(getattr(stream, way) for stream in streams) / tokens for way in ("up", "down")}


if __name__ == "__main__":
    main()

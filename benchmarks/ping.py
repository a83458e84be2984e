"""How far off the predictions of `lambda-split ping` are, across a network of 0, 20, 80 and 200 ms and 100 Mbit/s.

At each round trip, `ping` measures and predicts. Then settings run that it has not measured, in turns. Needs root,
as `benchmarks.wan` does, for the network.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from benchmarks.harness import arguments, checkpoint, decoded_together, exact_request, note, report
from benchmarks.network import Network
from benchmarks.wan import RATE, fleet_across
from split_common.system.process import passive_threads

#: A setting: `--speculate`, `--codec`, and how many sessions there are at once.
Setting = tuple[str, str, int]

#: The settings that run, by milliseconds of a round trip. `ping` measures steps of 1, 2, 4, 8 and 16 sessions. With
#: trees, it measures steps of 1, 2 and 4, and answers of one.
SETTINGS: dict[int, tuple[Setting, ...]] = {
    0: (("ngram", "exact", 1), ("off", "int8", 3), ("auto", "lossless", 6)),
    20: (("suffix", "int4", 1), ("recycle", "exact", 3), ("ngram", "int8", 3)),
    80: (("auto", "exact", 1), ("suffix-recycle", "int8", 1), ("off", "lossless", 12)),
    200: (("ngram", "lossless", 1), ("suffix-recycle", "exact", 3), ("ngram", "exact", 6)),
}

#: Times that each setting runs.
ROUNDS = 3


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rtts", default=",".join(map(str, SETTINGS)), help="milliseconds of round trips")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="times that each setting runs")
    options = parser.parse_args()
    passive_threads()
    report(measure(options), options.json, "predictions of ping")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Predicted and measured tokens per second of each setting, and how far apart they are."""
    model = checkpoint(options)
    rtts = [int(rtt) for rtt in options.rtts.split(",")]
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network())
        link = stack.enter_context(fleet_across(model, network))
        stack.enter_context(network.inside("near"))
        split = stack.enter_context(_device(model, link))
        cells: dict[str, dict[str, Any]] = {}
        for rtt in rtts:
            network.set(delay=rtt / 2000, rate=RATE, loss=0.0)
            cells |= _at(split, model, rtt, options.rounds)
    errors = [abs(cell["error"]) for cell in cells.values()]
    return {
        "settings": cells,
        "worst_error": max(errors),
        "median_error": statistics.median(errors),
        "identical": all(cell.pop("identical") for cell in cells.values()),
    }


def _device(model: Path, link: dict[str, Any]) -> Any:
    from split_device import SplitModelForCausalLM

    return SplitModelForCausalLM.from_pretrained(model, head_layers=2, tail_layers=2, dtype="float32", **link)


def _at(split: Any, model: Path, rtt: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Predicts, and then runs the settings of a round trip."""
    from split_common.models.codecs import CODECS
    from split_device.cli.ping import SAMPLE
    from split_device.generation.ping import Ping
    from split_device.generation.tokenizing import encode_chat, end_tokens, load_tokenizer

    tokenizer = load_tokenizer(str(model), None)
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": text}])[0].tolist() for text in SAMPLE]
    began = time.perf_counter()
    measured = Ping(split, prompts, end_tokens(split, tokenizer), note).measure()
    took = time.perf_counter() - began
    note(f"{rtt} ms: measured in {took:.0f} s, round trip {1000 * measured.round_trip.median:.1f} ms")
    for sessions, row in measured.cycles.items():
        times = ", ".join(f"{tokens}: {_ms(spread)}" for tokens, spread in row.items())
        off = _ms(measured.plain[sessions][1])
        note(f"cycles of {sessions} sessions in ms, without speculation {off}, and by tokens of a step: {times}")
    for text in measured.notes:
        note(f"not measured: {text}")
    runs: dict[Setting, list[float]] = defaultdict(list)
    identical: dict[Setting, bool] = {}
    for _ in range(rounds):
        for setting in SETTINGS[rtt]:
            speculate, codec, sessions = setting
            split.split_parts.client.codec = CODECS[codec]
            try:
                rate, same = run(split, measured.texts, speculate, sessions)
            finally:
                split.split_parts.client.codec = CODECS["exact"]
            runs[setting].append(rate)
            identical[setting] = identical.get(setting, True) and (same or codec in ("int8", "int4"))
    cells = {}
    for setting, rates in runs.items():
        found = measured.forecast(*setting)
        actual = statistics.median(rates)
        name = f"{rtt} ms, {setting[0]}, {setting[1]}, {setting[2]}"
        cells[name] = {
            "predicted": found.tokens_per_second,
            "measured": actual,
            "low": min(rates),
            "high": max(rates),
            "error": found.tokens_per_second / actual - 1,
            "identical": identical[setting],
        }
        note(
            f"{name}: predicted {found.tokens_per_second:.2f} tokens/s, measured {actual:.2f} "
            f"({min(rates):.2f} to {max(rates):.2f}), {cells[name]['error']:+.1%}"
        )
    return cells


def _ms(spread: Any) -> str:
    return f"{1000 * spread.mean:.0f} ({1000 * spread.low:.0f} to {1000 * spread.high:.0f})"


def run(split: Any, texts: Sequence[Any], speculate: str, sessions: int) -> tuple[float, bool]:
    """Tokens per second of the sample, as `forecast` counts them, and whether they are those of the sample."""
    from split_device.generation.generator import Generator
    from split_device.generation.limits import Limits
    from split_device.speculation.forecast import groups

    tokens, seconds, same = 0, 0.0, True
    with Generator(split, limits=Limits(prefix_cache=0, speculate=speculate)) as generator:
        generator.submit(exact_request(texts[0].prompt, 2, speculate="off")).result()
        for group in groups(texts, sessions):
            more, took, right = _group(generator, group)
            tokens, seconds, same = tokens + more, seconds + took, same and right
    return tokens / seconds, same


def _group(generator: Any, group: Sequence[Any]) -> tuple[int, float, bool]:
    """Tokens, and seconds from when all decode until the first one ends."""
    times: list[list[float]] = [[] for _ in group]
    running = [
        generator.submit(
            exact_request(text.prompt, len(text.answer)), lambda *_, mine=mine: mine.append(time.perf_counter())
        )
        for text, mine in zip(group, times, strict=True)
    ]
    futures.wait([generation.future for generation in running], return_when=futures.FIRST_COMPLETED)
    for generation in running:
        generation.cancel()
    same = all(
        generation.result() == text.answer[: len(generation.tokens)]
        for generation, text in zip(running, group, strict=True)
    )
    return *decoded_together(times), same


if __name__ == "__main__":
    main()

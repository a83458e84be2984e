"""Time to the first token of an answer, on an idle system and while a batch of 64 runs.

`lambda-split serve` is asked over HTTP. The batch runs on another device of the same broker and worker, as
`lambda-split batch`; or on the same device without priority, like the jobs of an agent.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.harness import arguments, checkpoint, exact_request, fleet, note, report, summary
from split_common.system.process import passive_threads, running_command
from split_device.batches.place import place_of
from split_device.jobs.job import FINAL
from split_device.jobs.store import Store

#: Number of requests in the batch, which run at once, and of their tokens: too many to end during the measurement.
BATCH = 64
BATCH_TOKENS = 1000

#: Number of questions, asked one after another.
ROUNDS = 15

#: Number of words in a question.
WORDS = 30

#: Longest pause before a question, in seconds.
PAUSE = 1.0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    passive_threads()
    report(measure(checkpoint(options), options.rounds), options.json, f"first token, beside a batch of {BATCH}")


def measure(model: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """Medians in milliseconds with their quartiles, and the medians' ratios."""
    with fleet(model, "2:-2", "--dtype", "float32") as (address, _):
        options = ["--model", str(model), "--broker", address, "--dtype", "float32"]
        plain = ["--prefix-cache", "off", "--speculate", "off"]
        with running_command(["serve", "--port", "0", *plain, *options]) as (_, server):
            ask = _Questions(server["url"], server["model"])
            ask.once()  # warm
            idle = ask.often(rounds)
            note(f"idle: {statistics.median(idle):.0f} ms")
            with _batch(options):
                busy = ask.often(rounds)
            note(f"beside another device's batch: {statistics.median(busy):.0f} ms")
        same_idle, same_busy = _one_device(model, address, rounds)
    results = summary(
        {
            "first_token_ms_idle": idle,
            "first_token_ms_busy": busy,
            "one_device_ms_idle": same_idle,
            "one_device_ms_busy": same_busy,
        }
    )
    for name in ("first_token", "one_device"):
        results[f"{name}_ratio"] = results[f"{name}_ms_busy"] / results[f"{name}_ms_idle"]
    return results


def _one_device(model: Path, address: str, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds to the first token of a request with a priority, alone and beside a batch of the same device."""
    from split_device import SplitModelForCausalLM
    from split_device.generation.generator import Generator

    draw = random.Random(6)

    def request(tokens: int, new_tokens: int, priority: int) -> Any:
        return exact_request([draw.randrange(20, 90) for _ in range(tokens)], new_tokens, priority=priority)

    def once() -> float:
        time.sleep(draw.uniform(0, PAUSE))
        began = time.perf_counter()
        next(iter(generator.submit(request(WORDS, 1, 1))))
        return 1000 * (time.perf_counter() - began)

    with (
        SplitModelForCausalLM.from_pretrained(model, broker=address, dtype="float32") as split,
        Generator(split, max_requests=2 * BATCH, prefix_cache=0, speculate="off") as generator,
    ):
        once()  # warm
        idle = [once() for _ in range(rounds)]
        batch = [generator.submit(request(draw.randrange(8, 128), BATCH_TOKENS, 0)) for _ in range(BATCH)]
        for generation in batch:
            next(iter(generation))
        busy = [once() for _ in range(rounds)]
        assert not any(generation.done for generation in batch), "the batch has ended"
    note(f"one device, alone: {statistics.median(idle):.0f} ms, beside its batch: {statistics.median(busy):.0f} ms")
    return idle, busy


class _Questions:
    """Asks a server random questions."""

    def __init__(self, url: str, model: str) -> None:
        self._host = urlsplit(url).netloc
        self._model = model
        self._draw = random.Random(5)

    def often(self, rounds: int) -> list[float]:
        return [self.once() for _ in range(rounds)]

    def once(self) -> float:
        """Milliseconds to the first token."""
        time.sleep(self._draw.uniform(0, PAUSE))
        text = " ".join(self._draw.choice(("sea", "light", "stone", "river", "cat")) for _ in range(WORDS))
        body = {"model": self._model, "prompt": text, "stream": True, "temperature": 0, "max_tokens": 1}
        began = time.perf_counter()
        with contextlib.closing(http.client.HTTPConnection(self._host)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body))
            line = connection.getresponse().readline()
        assert line.startswith(b"data: {"), line
        return 1000 * (time.perf_counter() - began)


@contextlib.contextmanager
def _batch(options: list[str]) -> Iterator[None]:
    """A running batch, of which every request has begun to decode; some may have ended."""
    with tempfile.TemporaryDirectory(prefix="lambda-split-batch-") as name:
        source, output = Path(name) / "in.jsonl", Path(name) / "out.jsonl"
        draw = random.Random(0)
        lines = []
        for index in range(BATCH):
            prompt = " ".join(draw.choice(("one", "blue", "day", "house")) for _ in range(draw.randrange(8, 128)))
            body = {"model": "any", "prompt": prompt, "max_tokens": BATCH_TOKENS, "temperature": 0}
            lines.append({"custom_id": str(index), "method": "POST", "url": "/v1/completions", "body": body})
        source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        os.environ["LAMBDA_SPLIT_STATE"] = str(Path(name) / "state")
        command = [sys.executable, "-m", "split_common", "batch", str(source), "-o", str(output), *options]
        plain = ["--prefix-cache", "off", "--speculate", "off"]
        process = subprocess.Popen([*command, "--max-jobs", str(2 * BATCH), *plain])
        try:
            while not place_of(output).store.exists() or _begun(output) < BATCH:
                assert process.poll() is None, "the batch has ended"
                time.sleep(0.2)
            yield
            assert process.poll() is None, "the batch has ended"
        finally:
            process.kill()
            process.wait()


def _begun(output: Path) -> int:
    """The number of requests of a batch that have begun to decode."""
    with contextlib.suppress(Exception), Store(place_of(output).store) as store:
        return sum(job.tokens > 1 or job.state in FINAL for job in store.jobs())
    return 0


if __name__ == "__main__":
    main()

"""How long a generation pauses when its worker is killed while it decodes, repeated many times.

A device in this process decodes without a break. Of two workers one holds the session: it is killed (SIGKILL), the
other one takes over, and a new one is started. Workers are forked from a process that has imported everything, so
that their start does not compete with the measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import arguments, checkpoint, generate_greedily, note, prompt, queue_server, report
from benchmarks.workers import Workers
from split_common.system.process import passive_threads

PROMPT_TOKENS = 64
NEW_TOKENS = 128

#: Number of steps at the beginning and end of a generation that no kill hits.
MARGIN = 8

#: Longest random delay between a step and a kill, in seconds, so that a kill may come at any time of a step.
JITTER = 0.1

#: How long the device may take to continue, in seconds.
LIMIT = 60.0

Kill = dict[str, float]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=50, help="number of kills for each transport")
    parser.add_argument("--transports", default="zmq,redis")
    options = parser.parse_args()
    passive_threads()
    model = checkpoint(options)
    results = {name: _measure(name, model, options) for name in options.transports.split(",")}
    report(results, options.json, f"recovery, {PROMPT_TOKENS} + {NEW_TOKENS} tokens")


def _measure(transport: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from split_device import SplitModelForCausalLM

    torch.set_num_threads(1)
    unsplit = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = prompt(unsplit.config.vocab_size, PROMPT_TOKENS)
    wanted = generate_greedily(unsplit, ids, NEW_TOKENS)
    del unsplit
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        address = stack.enter_context(queue_server(transport, Path(directory)))
        workers = stack.enter_context(Workers("--model", str(model), "--broker", address, "--dtype", "float32"))
        workers.start()
        split = stack.enter_context(SplitModelForCausalLM.from_pretrained(model, broker=address, dtype="float32"))
        clock = RecoveryClock(split)
        outputs: list[Any] = []
        stop = threading.Event()

        def decode() -> None:
            while not stop.is_set():
                outputs.append(generate_greedily(split, ids, NEW_TOKENS))

        decoding = threading.Thread(target=decode)
        decoding.start()
        try:
            kills = [_kill(workers, clock, transport, number) for number in range(options.kills)]
        finally:
            stop.set()
            decoding.join()
    results: dict[str, Any] = {"kills": len(kills), "identical": all(torch.equal(each, wanted) for each in outputs)}
    for key in ("detect_ms", "total_ms", "overhead_ms"):
        values = sorted(1000 * kill[key.removesuffix("_ms")] for kill in kills)
        results[f"{key}_p50"] = round(statistics.median(values), 1)
        results[f"{key}_p99"] = round(values[-(-99 * len(values) // 100) - 1], 1)
    return results


def _kill(workers: Workers, clock: RecoveryClock, transport: str, number: int) -> Kill:
    """Kills the worker in use; returns the durations, in seconds."""
    workers.start()
    rng = random.Random(number)
    clock.wait_for_decoding()
    time.sleep(rng.uniform(0, JITTER))
    workers.kill(clock.arm())
    kill = clock.wait_for_recovery()
    shown = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in kill.items())
    note(f"{transport}, kill {number + 1}: {shown}")
    return kill


class RecoveryClock:
    """Measures when the device notices a worker's death, and when it has its next token."""

    def __init__(self, split: Any) -> None:
        self._client = split._client
        self._open_session = self._client.open_session
        self._client.open_session = self._opening
        self._step = 0
        self._worker = b""
        self._stepped = threading.Condition()
        self._killed = self._detected = 0.0
        self._body_before = 0.0
        self._recovery: Kill | None = None
        split.register_forward_hook(self._after_step)

    def wait_for_decoding(self) -> None:
        """Waits for the end of a step in the middle of a generation."""
        with self._stepped:
            before = self._step
            self._stepped.wait_for(
                lambda: self._step != before and MARGIN < self._step % NEW_TOKENS < NEW_TOKENS - 2 * MARGIN, LIMIT
            )

    def arm(self) -> bytes:
        """Starts the measurement of a kill; returns the worker in use."""
        with self._stepped:
            self._recovery = None
            self._detected = 0.0
            self._replays = self._client.counters["replays"]
            self._body_before = self._client.timings.seconds["body"]
            self._killed = time.perf_counter()
            return self._worker

    def wait_for_recovery(self) -> Kill:
        """Seconds until the death was noticed, until the next token, and the latter without the body's time."""
        with self._stepped:
            if not self._stepped.wait_for(lambda: self._recovery is not None, LIMIT):
                raise RuntimeError("the device does not continue")
            assert self._recovery is not None
            return self._recovery

    def _opening(self, *args: Any, **kwargs: Any) -> Any:
        self._detected = self._detected or time.perf_counter()
        session = self._open_session(*args, **kwargs)
        self._worker = session.worker
        return session

    def _after_step(self, *_: Any) -> None:
        with self._stepped:
            self._step += 1
            if self._killed and self._client.counters["replays"] > self._replays:
                total = time.perf_counter() - self._killed
                body = self._client.timings.seconds["body"] - self._body_before
                detect = self._detected - self._killed
                self._recovery = {"detect": detect, "total": total, "overhead": total - body}
                self._killed = 0.0
            elif self._killed:
                # This answer was sent before the kill: the replay has not begun.
                self._body_before = self._client.timings.seconds["body"]
            self._stepped.notify_all()


if __name__ == "__main__":
    main()

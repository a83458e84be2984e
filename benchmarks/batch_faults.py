"""A batch whose process and workers are killed repeatedly: checks that every line still gets the same answer.

`lambda-split batch` runs over two workers, first undisturbed. Then it is killed (SIGKILL) several times, and
restarted by the same command. Workers are killed too, and each is replaced by a new one. Both runs' answers are
compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import arguments, checkpoint, note, report
from split_common.system.process import passive_threads, running_command
from split_common.system.signals import PARENT
from split_device.batches.place import place_of
from split_device.jobs.store import Store

LINES = 200
NEW_TOKENS = 16
BATCH_KILLS = 5
WORKER_KILLS = 10
WORKERS = 2

#: Time without a new token, or from the last kill to the end, after which the run fails, in seconds.
PATIENCE = 900.0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--lines", type=int, default=LINES)
    parser.add_argument("--batch-kills", type=int, default=BATCH_KILLS)
    parser.add_argument("--worker-kills", type=int, default=WORKER_KILLS)
    options = parser.parse_args()
    passive_threads()
    model = checkpoint(options)
    with tempfile.TemporaryDirectory(prefix="lambda-split-batch-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        os.environ["LAMBDA_SPLIT_STATE"] = str(directory / "state")
        source = directory / "in.jsonl"
        lines = requests(options.lines)
        source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        _, broker = stack.enter_context(running_command(["broker", "--bind", "tcp://127.0.0.1:*"]))
        batch = Batch(source, ["--model", str(model), "--broker", broker["address"]])
        with Workers(batch.options) as workers:
            began = time.perf_counter()
            wanted = batch.undisturbed(directory / "undisturbed.jsonl")
            undisturbed = time.perf_counter() - began
            note(f"undisturbed: {undisturbed:.0f} s")
            began = time.perf_counter()
            output = directory / "disturbed.jsonl"
            facts = batch.disturbed(output, workers, options.batch_kills, options.worker_kills)
            disturbed = time.perf_counter() - began
        found = records(output)
    for record in found:
        if record["error"]:
            note(f"{record['custom_id']}: {record['error']['message']}")
    asked = Counter(line["custom_id"] for line in lines)
    results = {
        "lines": len(lines),
        "batch_kills": facts["batch_kills"],
        "worker_kills": facts["worker_kills"],
        "each_answered_once": Counter(record["custom_id"] for record in found if record["response"]) == asked,
        "identical": [choices(record) for record in found] == [choices(record) for record in wanted],
        "errors": sum(record["error"] is not None for record in found),
        "tokens": sum(record["response"]["body"]["usage"]["completion_tokens"] for record in wanted),
        "undisturbed_s": undisturbed,
        "disturbed_s": disturbed,
    }
    report(results, options.json, f"a batch of {len(lines)} lines over {WORKERS} workers, killed repeatedly")
    if not (results["each_answered_once"] and results["identical"]):
        sys.exit(1)


def requests(count: int, tokens: int = NEW_TOKENS) -> list[dict[str, Any]]:
    """Lines of a batch file: chats of mixed length, alternately greedy and sampled with a seed."""
    draw = random.Random(8)
    words = ("ocean", "river", "why", "the cat", "says", "seven", "names of", "light", "and", "a stone", "blue")
    lines = []
    for index in range(count):
        text = " ".join(draw.choices(words, k=draw.randrange(1, 9)))
        sampling = {"temperature": 1, "top_p": 0.9, "seed": index} if index % 2 else {"temperature": 0}
        messages = [{"role": "user", "content": text}]
        body = {"model": "any", "messages": messages, "max_tokens": tokens, **sampling}
        lines.append({"custom_id": f"line-{index}", "method": "POST", "url": "/v1/chat/completions", "body": body})
    return lines


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def choices(record: dict[str, Any]) -> Any:
    """The answer of a line, without times and ids."""
    return record["custom_id"], record["response"] and record["response"]["body"]["choices"]


class Workers:
    """Worker processes, each of which is replaced by a new one when it is killed. A context manager.

    It does not wait until the new one is ready: the batch has to cope meanwhile.
    """

    def __init__(self, options: Sequence[str]) -> None:
        self._command = [sys.executable, "-m", "split_common", "worker", *options]
        self._running: deque[subprocess.Popen[bytes]] = deque()

    def __enter__(self) -> Workers:
        for _ in range(WORKERS):
            self._start()
        return self

    def kill(self) -> None:
        """Kills the worker that has run for the longest time."""
        _kill(self._running.popleft())
        self._start()

    def _start(self) -> None:
        env = {**os.environ, PARENT: str(os.getpid())}
        null = subprocess.DEVNULL
        self._running.append(subprocess.Popen(self._command, stdin=null, stdout=null, stderr=null, env=env))

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            _kill(process)


class Batch:
    """A file of requests, and the options with which `lambda-split batch` answers it."""

    def __init__(self, source: Path, options: list[str]) -> None:
        self.options = options
        self._source = source

    def undisturbed(self, output: Path) -> list[dict[str, Any]]:
        with self._running(output) as process:
            _end(process)
        return records(output)

    def disturbed(self, output: Path, workers: Workers, batch_kills: int, worker_kills: int) -> dict[str, int]:
        """Runs the batch to its end, with kills spread over its tokens.

        Returns:
            The numbers of kills; `kept`, a lower bound of the tokens in the store when the last run began; and
            `added`, the number of tokens that the last run generated.
        """
        lines = [json.loads(line) for line in self._source.read_text().splitlines()]
        total = sum(line["body"]["max_tokens"] for line in lines)
        victims = ["batch"] * batch_kills + ["worker"] * worker_kills
        random.Random(4).shuffle(victims)
        # Kills are due in the first half of all tokens, because answers may end before their limit.
        goals = deque(total * (index + 1) // (2 * len(victims)) for index in range(len(victims)))
        killed: Counter[str] = Counter()
        kept = 0
        while True:
            with self._running(output) as process:
                while goals and _reached(output, goals[0], process):
                    goal = goals.popleft()
                    killed[victim := victims.pop()] += 1
                    note(f"kill {killed[victim]} of a {victim}")
                    if victim == "batch":
                        _kill(process)
                        kept = goal
                        break
                    workers.kill()
                else:
                    added = _end(process)["tokens"]
                    kills = {"batch_kills": killed["batch"], "worker_kills": killed["worker"]}
                    return kills | {"kept": kept, "added": added}
            assert not output.exists(), "the answers were there before all lines were done"

    @contextlib.contextmanager
    def _running(self, output: Path) -> Iterator[subprocess.Popen[bytes]]:
        options = [*self.options, "--speculate", "off", "--json"]
        arguments = ["batch", str(self._source), "--output", str(output), *options]
        command = [sys.executable, "-m", "split_common", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            yield process
        finally:
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _end(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Waits for a batch's end; returns what it printed."""
    out, _ = process.communicate(timeout=PATIENCE)
    # 1 means that lines were answered by errors, which are counted.
    if process.returncode > 1:
        raise SystemExit(f"the batch ended with exit code {process.returncode}")
    facts: dict[str, Any] = json.loads(out)
    return facts


def _reached(output: Path, goal: int, process: subprocess.Popen[bytes]) -> bool:
    """Waits until a batch has `goal` tokens in its store; False if it ended before."""
    deadline, before = time.monotonic() + PATIENCE, 0
    while process.poll() is None:
        found = 0
        if place_of(output).store.exists():
            # The store may not be complete yet.
            with contextlib.suppress(Exception), Store(place_of(output).store) as store:
                found = store.generated()
        if found >= goal:
            return True
        if found > before:
            deadline, before = time.monotonic() + PATIENCE, found
        if time.monotonic() > deadline:
            raise SystemExit(f"the batch has made no progress for {PATIENCE:g} s")
        time.sleep(0.02)
    return False


if __name__ == "__main__":
    main()

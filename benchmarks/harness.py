"""Shared by the benchmarks: a fleet of processes, a proxy that counts bytes, and the output of results."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from split_common.models.demo_model import ensure_demo_model
from split_common.system.process import running_command
from split_common.system.servers import RedisServer
from split_device.stress.proxy import Proxy, proxied


def arguments(description: str | None, model: str = "SmolLM2-135M-Instruct") -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks; `model` describes the default model."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument("--model", type=Path, help=f"a checkpoint; default: {model}")
    return parser


def checkpoint(options: argparse.Namespace) -> Path:
    """The model to measure."""
    return options.model or ensure_demo_model()


def compiled(model: Path) -> None:
    """Has the code compiled that workers run a model's layers by, so that none does it while it is measured."""
    from split_common.engine import native
    from split_common.engine.tuning import LEAST_BYTES

    if sum(file.stat().st_size for file in model.glob("*.safetensors")) >= LEAST_BYTES and native.begin():
        native.wait()


def prompt(vocabulary: int, tokens: int) -> Any:
    """Token ids `[1, tokens]`, int64, the same each time; without special tokens unless the vocabulary is tiny."""
    import torch

    first = min(100, vocabulary // 2)
    return torch.randint(first, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))


def generate_greedily(model: Any, ids: Any, tokens: int, **options: Any) -> Any:
    """Generates exactly `tokens` tokens greedily after a prompt `[1, tokens]`; returns prompt and answer.

    Args:
        options: further ones of `generate`.
    """
    import torch

    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
        **options,
    )


def exact_request(
    prompt: Sequence[int], tokens: int, sampling: Mapping[str, Any] | None = None, **fields: Any
) -> Any:
    """A `Request` for exactly so many tokens: the model's own end does not end it.

    Args:
        prompt: token ids.
        tokens: of the answer.
        sampling: fields of its `GenerationConfig`; None for a greedy one.
        fields: of the `Request`.
    """
    from transformers import GenerationConfig

    from split_device.generation.generator import Request
    from split_device.generation.settings import NO_END

    chosen = sampling or {"do_sample": False}
    config = GenerationConfig(max_new_tokens=tokens, eos_token_id=[NO_END], pad_token_id=0, **chosen)
    return Request(list(prompt), config, **fields)


def decoded_together(arrivals: Sequence[Sequence[float]]) -> tuple[int, float]:
    """Tokens that came, and seconds, from when all answers decode until the first one ends.

    Args:
        arrivals: when each answer's tokens came.
    """
    begin, end = max(mine[0] for mine in arrivals), min(mine[-1] for mine in arrivals)
    return sum(begin < at <= end for mine in arrivals for at in mine), end - begin


def in_turns(rounds: int, what: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Measures each of some things once in every round, one after the other: so what changes the machine's speed
    changes it for all of them. Returns what they returned, by name, in the order of the rounds."""
    found: dict[str, list[float]] = {name: [] for name in what}
    for round_ in range(rounds):
        for name, measure in what.items():
            found[name].append(measure())
        note(f"round {round_ + 1} of {rounds}: " + ", ".join(f"{name} {v[-1]:.4g}" for name, v in found.items()))
    return found


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """The ratio in each round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def spread(values: Sequence[float]) -> list[float]:
    """The first and the third quartile."""
    if len(values) == 1:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def summary(rounds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The median over all rounds of each value, by its name, and its quartiles as `NAME_spread`."""
    results: dict[str, Any] = {}
    for name, values in rounds.items():
        results[name] = statistics.median(values)
        results[f"{name}_spread"] = spread(values)
    return results


def report(results: dict[str, Any], as_json: bool, title: str) -> None:
    """Prints the results as a table, or as one line of JSON, with the name of the CPU."""
    results = {"cpu": cpu_name(), **results}
    if as_json:
        print(json.dumps(results), flush=True)
        return
    table = Table("key", title=title)
    table.add_column("value", justify="right")
    for key, value in results.items():
        table.add_row(key, _text(value))
    Console(highlight=False).print(table)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}"
    if isinstance(value, list):
        return " to ".join(map(_text, value))
    return str(value)


def note(text: str) -> None:
    """Prints progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def now(place: Any) -> float:
    """`time.perf_counter` after a torch device has finished its queued work."""
    import torch

    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter()


def cpu_name() -> str:
    """The processor's name, as Linux has it, with its family and model; else its architecture.

    Virtual machines often leave of the name no more than "AMD EPYC".
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


@contextlib.contextmanager
def fleet(model: Path, layers: str = "2:-2", *options: str) -> Iterator[tuple[str, int]]:
    """Runs a broker and a worker on the loopback; yields the broker's address and the worker's process id."""
    with (
        running_command(["broker", "--bind", "tcp://127.0.0.1:*"]) as (_, broker),
        running_command(
            ["worker", "--model", str(model), "--layers", layers, "--broker", broker["address"], *options]
        ) as (_, worker),
    ):
        yield broker["address"], int(worker["pid"])


@contextlib.contextmanager
def queue_server(transport: str, directory: Path) -> Iterator[str]:
    """Runs a broker (`zmq`, or `ipc`) or a Redis server (`redis`) on the loopback; yields its address."""
    if transport != "redis":
        bind = "tcp://127.0.0.1:*" if transport == "zmq" else f"ipc://{directory}/queue"
        with running_command(["broker", "--bind", bind]) as (_, broker):
            yield broker["address"]
    else:
        server = RedisServer(directory, persistent=True)
        with server.running():
            yield server.address


@contextlib.contextmanager
def counted(address: str) -> Iterator[tuple[Proxy, str]]:
    """Yields a proxy that counts the bytes to a queue and back, and the address to use instead of the queue's."""
    proxy, before = proxied(address)
    try:
        yield proxy, before
    finally:
        proxy.close()

"""Runs the benchmarks that have aims, several times, and keeps what each CPU gave.

All benchmarks run once, then all again, and so on. After each round, what has been measured is written to
`docs/figures/CPU.json`, and the table of all such files into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import cpu_name, note
from split_common.system.files import write_public

ROOT = Path(__file__).parents[1]
FIGURES = Path("docs/figures")
PAGE = Path("docs/benchmarks.md")
BEGIN, END = "<!-- figures: written by benchmarks.all -->\n", "<!-- end of figures -->\n"

#: Arguments of each benchmark, and those that make it quick.
BENCHMARKS: dict[str, tuple[list[str], list[str]]] = {
    "overhead": ([], ["--rounds", "1"]),
    "profile": ([], ["--sessions", "1,4", "--steps", "3"]),
    "concurrency": ([], ["--rounds", "1", "--sessions", "1,2", "--devices", "2"]),
    "batch": ([], ["--rounds", "1", "--prompts", "6", "--sequential", "3"]),
    "queue": ([], ["--rounds", "2", "--share", "0.1"]),
    "first_token": ([], ["--rounds", "1"]),
}


@dataclass(frozen=True)
class Aim:
    """What a figure is expected to be: at least `bound`, or at most."""

    benchmark: str
    key: str
    meaning: str
    bound: float
    at_least: bool = True

    def met(self, values: Iterable[float]) -> bool:
        """Whether all of them are as expected."""
        return all(value >= self.bound if self.at_least else value <= self.bound for value in values)


AIMS = (
    Aim("overhead", "ratio", "one stream, split / unsplit", 1.3),
    Aim("overhead", "payload_efficiency", "hidden states / bytes on the wire", 0.9),
    Aim("profile", "bound_ratio_1", "one session's step / reading the weights once", 1.5, at_least=False),
    Aim("concurrency", "single_ratio", "1 session / transformers' layers", 1.5),
    Aim("concurrency", "speedup_16", "16 sessions / transformers' layers", 8),
    Aim("concurrency", "ratio_8", "8 devices / the unsplit model", 3),
    Aim("concurrency", "itl_ratio", "p99 between tokens, beside prefills / alone", 3, at_least=False),
    Aim("batch", "ratio_sequential", "64 prompts / one after another, unsplit", 7),
    Aim("batch", "ratio_batched", "64 prompts / padded batches, unsplit", 1.3),
    Aim("queue", "zmq_ratio_2k", "ZeroMQ, 2 KiB / plain echo and four AEAD passes", 1.5, at_least=False),
    Aim("queue", "zmq_ratio_1m", "ZeroMQ, 1 MiB", 1.3, at_least=False),
    Aim("queue", "redis_ratio_2k", "Redis, 2 KiB", 1.5, at_least=False),
    Aim("queue", "redis_ratio_1m", "Redis, 1 MiB", 1.3, at_least=False),
    Aim("first_token", "first_token_ratio", "first token beside another device's batch / alone", 3, at_least=False),
    Aim(
        "first_token",
        "one_device_ratio",
        "first token beside the same device's batch / alone",
        3,
        at_least=False,
    ),
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument("--model", type=Path, help="a checkpoint; default: SmolLM2-135M-Instruct")
    parser.add_argument("--runs", type=int, default=3, help="number of runs of each benchmark")
    parser.add_argument("--only", default="", help=f"some of {','.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="few rounds; nothing is written to docs/")
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(BENCHMARKS)
    if unknown := sorted(set(names) - set(BENCHMARKS)):
        parser.error(f"unknown in --only: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if options.runs < 1:
        parser.error("--runs: at least 1")
    if options.model and not options.quick:
        parser.error("--model needs --quick: the figures in docs/ are those of SmolLM2-135M-Instruct")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for index in range(options.runs):
        for name in names:
            note(f"run {index + 1} of {options.runs}: {name}")
            runs[name].append(_run(name, options))
        if not options.quick:
            _keep(runs)
    figures = {f"{aim.benchmark}.{aim.key}": _values(runs, aim) for aim in AIMS if aim.benchmark in runs}
    if options.json:
        print(json.dumps({"cpu": cpu_name(), "runs": options.runs, **figures}), flush=True)
    else:
        print(table({cpu_name(): runs}), end="")


def _run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    arguments, quick = BENCHMARKS[name]
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *arguments]
    if options.quick:
        command += quick
    if options.model and name != "queue":
        command += ["--model", str(options.model)]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"benchmarks.{name} failed: exit code {done.returncode}")
    note(f"{name}: {time.monotonic() - began:.0f} s")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _keep(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes what was measured, beside what the file of this CPU has of other benchmarks, and the page's table."""
    import torch

    slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    path = ROOT / FIGURES / f"{slug}.json"
    path.parent.mkdir(exist_ok=True)
    kept: dict[str, Any] = {"cpu": cpu_name(), "runs": {}, "measured": {}}
    if path.exists():
        kept = json.loads(path.read_text())
    for name, found in runs.items():
        kept["runs"][name] = found
        kept["measured"][name] = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    write_public(path, f"{json.dumps(kept, indent=1)}\n".encode())
    page = ROOT / PAGE
    write_public(page, with_table(page.read_text(), all_kept()).encode())


def all_kept() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """All runs that are kept in `docs/figures`: by CPU, and by benchmark."""
    files = [json.loads(path.read_text()) for path in sorted((ROOT / FIGURES).glob("*.json"))]
    return {kept["cpu"]: kept["runs"] for kept in files}


def with_table(page: str, kept: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """The page, with the table of these runs between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{PAGE} has no marks for the table of figures: {BEGIN.strip()} and {END.strip()}")
    rows = f"{table(kept)}\n" if kept else ""
    return f"{before}{BEGIN}\n{rows}{END}{after}"


def table(kept: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """A table in Markdown: a row for each aim, a column for each CPU with the figure of each run.

    Figures are bold where a run missed the aim.
    """
    lines = [f"| | aim | {' | '.join(kept)} |", f"| --- | --- |{' --- |' * len(kept)}"]
    for aim in AIMS:
        cells = []
        for runs in kept.values():
            values = _values(runs, aim)
            text = ", ".join(f"{value:.2f}" for value in values)
            cells.append(text if aim.met(values) else f"**{text}**")
        if any(cells):
            bound = f"{'≥' if aim.at_least else '≤'} {aim.bound:g}"
            lines.append(f"| `{aim.benchmark}` {aim.key}: {aim.meaning} | {bound} | {' | '.join(cells)} |")
    return "".join(f"{line}\n" for line in lines)


def _values(runs: Mapping[str, Sequence[Mapping[str, Any]]], aim: Aim) -> list[float]:
    return [run[aim.key] for run in runs.get(aim.benchmark, []) if aim.key in run]


if __name__ == "__main__":
    main()

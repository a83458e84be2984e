"""Tokens/s of one stream beside other systems: transformers, CTranslate2, llama.cpp, and Language Pipes (split).

All generate the same answer greedily, in turns. Those that are not installed, or fail, are named with the reason.
`make bench-peers` installs them and runs this.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    arguments,
    checkpoint,
    compiled,
    fleet,
    generate_greedily,
    in_turns,
    note,
    ratios,
    report,
    summary,
)
from benchmarks.systems.stream import Question
from split_common.system.process import passive_threads

ROOT = Path(__file__).parents[1]

#: The environment of the other systems.
ENVIRONMENT = ROOT / ".venv-peers"

#: The modules of the programs that run there, by the system's name.
PROGRAMS = {
    "ctranslate2": "benchmarks.systems.ctranslate",
    "llama_cpp": "benchmarks.systems.llama_cpp_python",
    "language_pipes": "benchmarks.systems.pipes",
}

#: What all others are compared with: the unsplit model, and the split one.
UNSPLIT, SPLIT = "transformers", "lambda_split"

#: The prompt, whose answer has more tokens than are asked for.
PROMPT = "Explain how a bicycle stays upright."
TOKENS = 96

#: Seconds until a program has loaded the model, and has answered.
LOAD_LIMIT, ANSWER_LIMIT = 600.0, 300.0


class SystemFailed(Exception):
    """A system is not installed, or has failed; the message says why."""


@dataclass
class System:
    """One of those that are compared."""

    answer: Callable[[Question], Mapping[str, Any]]
    #: Why it is left out.
    missing: str | None = None

    def rate(self, question: Question) -> float:
        """Tokens/s after the first one; NaN, and the reason kept, if it fails."""
        if self.missing is None:
            try:
                arrivals = self.answer(question)["arrivals"]
                if len(arrivals) != question.tokens:
                    raise SystemFailed(f"{len(arrivals)} tokens came instead of {question.tokens}")
                return (question.tokens - 1) / float(arrivals[-1] - arrivals[0])
            except SystemFailed as failure:
                self.missing = str(failure)
        return math.nan


class Program:
    """A program of `benchmarks.systems` that runs in another environment.

    Args:
        command: its command line.
        surroundings: environment variables; None for those of this process.

    Raises:
        SystemFailed: it cannot be started, or not load the model.
    """

    def __init__(self, command: Sequence[str], surroundings: Mapping[str, str] | None = None) -> None:
        try:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=surroundings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise SystemFailed(f"cannot start {command[0]}: {error.strerror}") from None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._told(LOAD_LIMIT)
        except BaseException:
            self.close()
            raise

    def answer(self, question: Question) -> Mapping[str, Any]:
        """What the program's `timed` returns. Raises SystemFailed if it ends, fails or takes too long."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(asdict(question)), file=self._process.stdin, flush=True)
        except OSError:
            raise SystemFailed("it has ended") from None
        return self._told(ANSWER_LIMIT)

    def close(self) -> None:
        """Ends it."""
        for step in (self._process.stdin.close, self._process.terminate, self._process.kill):  # type: ignore[union-attr]
            with contextlib.suppress(OSError):
                step()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
                return

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _told(self, limit: float) -> Mapping[str, Any]:
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            raise SystemFailed(f"no answer in {limit:.0f} s") from None
        if not line:
            raise SystemFailed("it has ended without a message")
        told: Mapping[str, Any] = json.loads(line)
        if "error" in told:
            raise SystemFailed(told["error"])
        return told


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="times that each system generates")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each answer")
    parser.add_argument("--only", default=",".join(PROGRAMS), help="the other systems to run")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="where they are installed")
    options = parser.parse_args()
    if unknown := set(filter(None, options.only.split(","))) - set(PROGRAMS):
        parser.error(f"--only: {', '.join(sorted(unknown))}; there are {', '.join(PROGRAMS)}")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    surroundings = dict(os.environ)
    passive_threads()
    report(measure(options, surroundings), options.json, f"tokens/s of one stream, {options.tokens} tokens")


def measure(options: argparse.Namespace, surroundings: Mapping[str, str]) -> dict[str, Any]:
    """Tokens/s of each system, whether its answer is transformers' own, and which are missing.

    Args:
        surroundings: environment variables of the other systems.
    """
    model = checkpoint(options)
    compiled(model)
    with contextlib.ExitStack() as stack:
        tokenizer, systems = stack.enter_context(_ours(model))
        question = _question(tokenizer, options.tokens)
        for name in filter(None, options.only.split(",")):
            note(f"loading {name}")
            systems[name] = stack.enter_context(_program(name, model, options, surroundings))
        answers = _first_answers(systems, question)
        rates = in_turns(options.rounds, {name: partial(each.rate, question) for name, each in systems.items()})
    missing = {name: each.missing for name, each in systems.items() if each.missing is not None}
    figures = {f"{name}_tok_s": values for name, values in rates.items() if name not in missing}
    for name in (name for name in rates if name not in (SPLIT, *missing)):
        figures[f"over_{name}"] = ratios(rates[SPLIT], rates[name])
    return {
        **summary(figures),
        "identical": {
            name: same_answer(answer, answers[UNSPLIT], tokenizer.decode)
            for name, answer in answers.items()
            if name not in missing
        },
        "missing": missing,
        "threads": options.threads,
        "prompt_tokens": len(question.ids),
        "tokens": question.tokens,
    }


def same_answer(answer: Mapping[str, Any], expected: Mapping[str, Any], decode: Callable[[list[int]], str]) -> bool:
    """Whether an answer has the expected token ids; of text alone, whether it is the text of these.

    Args:
        decode: the text of token ids.
    """
    return bool(answer["ids"] == expected["ids"] if "ids" in answer else answer["text"] == decode(expected["ids"]))


def _question(tokenizer: Any, tokens: int) -> Question:
    from benchmarks.prompts import encoded_prompt

    return Question(encoded_prompt(tokenizer, PROMPT), PROMPT, tokens)


def _first_answers(systems: Mapping[str, System], question: Question) -> dict[str, Mapping[str, Any]]:
    """An answer of each system, which also warms it up. Those that fail are marked."""
    answers: dict[str, Mapping[str, Any]] = {}
    for name, system in systems.items():
        if system.missing is None:
            try:
                answers[name] = system.answer(question)
            except SystemFailed as failure:
                system.missing = str(failure)
        if system.missing is not None:
            note(f"{name} is left out: {system.missing}")
    return answers


@contextlib.contextmanager
def _program(
    name: str, model: Path, options: argparse.Namespace, surroundings: Mapping[str, str]
) -> Iterator[System]:
    python = options.environment.absolute() / "bin" / "python"
    with tempfile.TemporaryDirectory() as work:
        command = [str(python), "-m", PROGRAMS[name], str(model.resolve()), work, str(options.threads)]
        try:
            program = Program(command, surroundings)
        except SystemFailed as failure:
            yield System(lambda _: {}, str(failure))
            return
        try:
            yield System(program.answer)
        finally:
            program.close()


@contextlib.contextmanager
def _ours(model: Path) -> Iterator[tuple[Any, dict[str, System]]]:
    """The tokenizer, and the unsplit model and the split one, by their names."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from split_device import SplitModelForCausalLM

    unsplit = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with (
        fleet(model, "2:-2", "--dtype", "float32") as (address, _),
        SplitModelForCausalLM.from_pretrained(model, broker=address, dtype="float32") as split,
    ):
        systems = {name: System(partial(_generated, which)) for name, which in ((UNSPLIT, unsplit), (SPLIT, split))}
        yield AutoTokenizer.from_pretrained(model), systems


class _Arrivals:
    """A streamer of transformers that notes when tokens come. The first to come is the prompt."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: list[float] = []

    def put(self, _tokens: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)

    def end(self) -> None:
        """Does nothing."""


def _generated(model: Any, question: Question) -> dict[str, Any]:
    """What `timed` returns, by a model of this process."""
    import torch

    arrivals = _Arrivals()
    ids = torch.tensor([question.ids])
    answer = generate_greedily(model, ids, question.tokens, streamer=arrivals)[0, ids.shape[1] :]
    return {"arrivals": arrivals.seconds[1:], "ids": answer.tolist()}


if __name__ == "__main__":
    main()

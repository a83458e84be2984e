"""Runs the code blocks of a page of the docs as a reader would, in order, and compares what they print.

What a page may hold, and what becomes of it:

- `console`: lines that begin with `$ ` are commands, for bash; the lines below one are what it prints. A command
  ends before the next one begins, unless it runs until it is stopped (`RUNS_ON`): then the next one begins when
  everything that is shown has been printed. `^C` in a line of its own is Ctrl-C, which a batch gets when it has an
  answer; what follows is printed by it. Lines that begin with `> ` are typed, into `lambda-split chat` for example.
  Only a command that ends with a comment like `# exit code 1` fails.
- `bash` and `python`: a script. It has to succeed.
- `text`: right below a script, what it prints; elsewhere it is not run.
- A block right below `<!-- not run: REASON -->` is not run.

A page is walked in a home directory of its own that has the demo model in its cache, and in a directory in which
`examples` is the repository's. `PLACEHOLDERS` and `STAND_INS` say what is replaced. The queue and the server get
free ports, and ids of jobs are those that were printed on the way.

Every line of stdout must be shown, and every line that is shown must be printed, in the same order. Of stderr,
lines may be left out, because a terminal removes progress when it is done. A line `…` stands for any number of
lines. `MASKS` says which differences do not count.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: Seconds that a command may take, and that one may take to be ready or to end: a bound on a hang.
PATIENCE = 900.0

#: Seconds between two looks at what a command has printed.
INTERVAL = 0.1

#: Commands that run until they are stopped.
RUNS_ON = re.compile(r"lambda-split (?:broker|worker|serve|demo --serve|agent run)\b")

#: What placeholders stand for, in commands and in what they print.
PLACEHOLDERS = {"<BROKER>": "127.0.0.1", "<KEYS>": "fleet"}

#: Parts of commands that are replaced, because they install something or are seen by the network.
STAND_INS = {
    r"\bmake demo-image\b": "lambda-split demo --image",
    r"\bmake demo\b": "lambda-split demo",
    r"tcp://0\.0\.0\.0:7411": "'tcp://127.0.0.1:*'",
    r"--port 8080": "--port 0",
}

#: What differs from run to run or from machine to machine, and what stands in its place in a comparison.
MASKS = {
    # Ids, names of processes and digests.
    r"(?<=-\d/)[0-9a-f]{8}\b|(?<=session )[0-9a-f]{8}\b": "<hex>",
    r"\b(?=\w*\d)[0-9a-f]{6,}\b…?": "<hex>",
    # Times and rates.
    r"\b\d[\d,]*(?:\.\d+)?(?= (?:ms|s|tokens/s)\b)": "<n>",
    # How much of a batch was done before Ctrl-C.
    r"\b\d+(?= of \d+ (?:answers are kept|are already answered))": "<n>",
    # How long ago a job was submitted.
    r"(?<= )\d+(?:s|m|h)(?= )": "<n>",
    # What has travelled: after a delay, some of it travels twice.
    r"\b\d[\d,.]*(?=(?: bytes)? (?:up|down)\b| MB in all\b| MB came\b)": "<n>",
    # What fits into a worker's memory.
    r"\b[\d,]+(?= tokens, or)|(?<=tokens, or )\d+": "<n>",
    # Sums in another order differ by the last bits of float32.
    r"(?<=largest difference of a pixel )[\d.e-]+": "<n>",
    # A table's columns are as wide as their longest cell.
    r"[ \t]+": " ",
    r"[━─]+": "─",
}

#: Ends a command that fails.
EXIT_CODE = re.compile(r" # exit code (\d+)$")

#: Ids that a command prints and that later commands name.
ID = re.compile(r"\b(?:job|batch)-[0-9a-f]{12,16}\b")

#: A port in the docs, and what prints the one that is used instead.
PORTS = {
    "7411": re.compile(r"^broker on tcp://127\.0\.0\.1:(\d+)"),
    "8080": re.compile(r"http://127\.0\.0\.1:(\d+)"),
}

_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n+)?"
    r"^(?P<fence>`{3,})(?P<language>[\w-]*)\n(?P<code>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Command:
    """A command of a console."""

    text: str
    #: Lines that are typed into it.
    typed: list[str] = field(default_factory=list)
    #: Lines that it prints, by itself and after Ctrl-C.
    shown: list[str] = field(default_factory=list)
    shown_after_interrupt: list[str] | None = None


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    page: Path
    #: Number of the line on which it begins.
    line: int
    language: str
    code: str
    #: Why it is not run; None if it is.
    reason: str | None
    #: What a script prints, if the page shows it.
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def commands(self) -> Iterator[Command]:
        """The commands of a console. Raises ValueError for output without a command."""
        command: Command | None = None
        for line in self.code.replace("\\\n", "").splitlines():
            if line.startswith("$ "):
                if command is not None:
                    yield command
                command = Command(line.removeprefix("$ "))
            elif command is None:
                raise ValueError(f"{self}: a console begins with a command: {line!r}")
            elif line == "^C":
                command.shown_after_interrupt = []
            elif line.startswith("> "):
                command.typed.append(line.removeprefix("> "))
            elif command.shown_after_interrupt is not None:
                command.shown_after_interrupt.append(line)
            else:
                command.shown.append(line)
        if command is not None:
            yield command


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order; the output of a script belongs to the script."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("fence")) + 1
        block = Block(page, line, match["language"], match["code"], match["reason"])
        follows = not text[end : match.start()].strip()
        if found and follows and block.language == "text" and found[-1].language in ("bash", "python"):
            found[-1] = Block(**(vars(found[-1]) | {"output": block.code}))
        else:
            found.append(block)
        end = match.end()
    return found


def masked(line: str) -> str:
    """A line without what may differ."""
    for pattern, instead in MASKS.items():
        line = re.sub(pattern, instead, line)
    return line.strip()


def difference(shown: Sequence[str], out: Sequence[str], err: Sequence[str]) -> str | None:
    """What is wrong with the lines that a page shows, given those that were printed; None if nothing is."""
    left_out = False
    at_out = at_err = 0
    for line in shown:
        if line == "…":
            left_out = True
            continue
        wanted = masked(line)
        if not wanted:
            continue
        found = next((i for i in range(at_out, len(out)) if masked(out[i]) == wanted), None)
        if found is not None and (left_out or not _text(out[at_out:found])):
            at_out, left_out = found + 1, False
            continue
        found = next((i for i in range(at_err, len(err)) if masked(err[i]) == wanted), None)
        if found is None:
            return f"not printed: {line}"
        at_err = found + 1
    if not left_out and (rest := _text(out[at_out:])):
        return f"not shown: {rest[0]}"
    return None


def _text(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if line.strip()]


class Running:
    """A process whose lines of stdout and stderr are collected."""

    def __init__(self, command: Sequence[str], env: dict[str, str], directory: Path, typed: str) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=directory,
            start_new_session=True,  # so that Ctrl-C reaches all of the command and nothing else
        )
        self.out: list[str] = []
        self.err: list[str] = []
        assert self.process.stdin is not None
        self.process.stdin.write(typed)
        self.process.stdin.close()
        pipes = (self.process.stdout, self.out), (self.process.stderr, self.err)
        self._readers = [threading.Thread(target=_collect, args=pipe, daemon=True) for pipe in pipes]
        for reader in self._readers:
            reader.start()

    def wait(self) -> int:
        code = self.process.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)
        return code

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()

    def printed(self) -> str:
        return "".join(f"\n  | {line}" for line in [*self.out, *self.err])


def _collect(pipe: Iterator[str], lines: list[str]) -> None:
    lines.extend(line.rstrip("\n") for line in pipe)


def _answered(store: Path) -> int:
    """The number of answers in a store of jobs."""
    with contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as connection:
        return int(connection.execute("SELECT count(*) FROM jobs WHERE state = 'succeeded'").fetchone()[0])


class Walk:
    """Runs the blocks of one page; leave it to end what still runs."""

    def __init__(self, home: Path, checkpoint: Path, repository: Path) -> None:
        self._directory = home / "lambda-split"
        self._directory.mkdir()
        (self._directory / "examples").symlink_to(repository / "examples")
        models = home / ".cache" / "lambda-split" / "models"
        models.mkdir(parents=True)
        (models / checkpoint.name).symlink_to(checkpoint)
        (home / "run").mkdir(mode=0o700)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LAMBDA_SPLIT_", "XDG_"))}
        self._env = kept | {
            "HOME": str(home),
            "LAMBDA_SPLIT_CACHE": str(models.parent),
            "LAMBDA_SPLIT_RUNTIME": str(home / "run"),
            "LAMBDA_SPLIT_BIND": "tcp://127.0.0.1:*",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "COLUMNS": "120",
            # The docs show what runs on a CPU.
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }
        self._actual = PLACEHOLDERS | {"/home/you/lambda-split": str(self._directory), "/home/you": str(home)}
        self._background: list[Running] = []

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        for running in self._background:
            running.kill()
        # The agent is nobody's child. Where none runs, this does nothing.
        self._start("lambda-split agent stop").wait()

    def run(self, block: Block) -> None:
        """Runs one block. Raises AssertionError if it fails, or prints something else than the page shows."""
        if block.language == "console":
            for command in block.commands():
                self._run(block, command)
            return
        words = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        running = Running([*words, self._replaced(block.code)], self._env, self._directory, "")
        try:
            code = running.wait()
        finally:
            running.kill()
        assert code == 0, f"{block}: exit code {code}{running.printed()}"
        if block.output is not None:
            self._compare(block, running, block.output.splitlines())

    def stop(self) -> None:
        """Ends what runs in the background, as Ctrl-C does. Raises AssertionError if it does not end in order."""
        while self._background:
            running = self._background.pop()
            running.interrupt()
            code = running.wait()
            assert code in (0, 130), f"exit code {code}{running.printed()}"

    def _run(self, block: Block, command: Command) -> None:
        running = self._start(command.text, "".join(f"{line}\n" for line in command.typed))
        if not RUNS_ON.search(command.text) and command.shown_after_interrupt is None:
            try:
                code = running.wait()
            finally:
                running.kill()
            expected = EXIT_CODE.search(command.text)
            assert code == (int(expected[1]) if expected else 0), (
                f"{block}: {command.text}: exit code {code}{running.printed()}"
            )
            self._compare(block, running, command.shown)
            return
        self._background.append(running)
        assert command.shown, f"{block}: {command.text}: the page has to show by what one sees that it runs"
        self._wait_until_ready(block, running, command)
        if command.shown_after_interrupt is not None:
            self._background.remove(running)
            self._wait_for_an_answer(block, running, command)
            before = len(running.out), len(running.err)
            running.interrupt()
            code = running.wait()
            assert code in (0, 130), f"{block}: {command.text}: exit code {code}{running.printed()}"
            fault = difference(
                self._expected(command.shown_after_interrupt), running.out[before[0] :], running.err[before[1] :]
            )
            assert fault is None, f"{block}: {fault}{running.printed()}"

    def _start(self, text: str, typed: str = "") -> Running:
        return Running(["bash", "-c", self._replaced(text)], self._env, self._directory, typed)

    def _wait_until_ready(self, block: Block, running: Running, command: Command) -> None:
        end = time.monotonic() + PATIENCE
        while (fault := difference(self._expected(command.shown), running.out, running.err)) is not None:
            assert running.process.poll() is None, f"{block}: {command.text} ended{running.printed()}"
            assert time.monotonic() < end, f"{block}: {fault}{running.printed()}"
            self._learn_ports(running)
            time.sleep(INTERVAL)
        self._learn_ports(running)

    def _wait_for_an_answer(self, block: Block, running: Running, command: Command) -> None:
        """Waits until a batch has an answer in its store; does nothing for other commands."""
        stores = Path(self._env["HOME"]) / ".local" / "state" / "lambda-split" / "batches"
        end = time.monotonic() + PATIENCE
        while "lambda-split batch" in command.text and not any(map(_answered, stores.glob("*.db"))):
            assert running.process.poll() is None, f"{block}: {command.text} ended{running.printed()}"
            assert time.monotonic() < end, f"{block}: {command.text} answers nothing{running.printed()}"
            time.sleep(INTERVAL)

    def _learn_ports(self, running: Running) -> None:
        for port, pattern in PORTS.items():
            for match in filter(None, map(pattern.search, [*running.out, *running.err])):
                self._actual[f"127.0.0.1:{port}"] = self._actual[f"0.0.0.0:{port}"] = f"127.0.0.1:{match[1]}"
                if port == "7411":
                    self._env["LAMBDA_SPLIT_BROKER"] = f"tcp://127.0.0.1:{match[1]}"

    def _compare(self, block: Block, running: Running, shown: Sequence[str]) -> None:
        shown = self._expected(shown)
        fault = difference(shown, running.out, running.err)
        assert fault is None, f"{block}: {fault}{running.printed()}"
        printed = [*running.out, *running.err]
        for line in shown:
            # The same line with other ids.
            same = next((other for other in printed if masked(other) == masked(line)), "")
            self._actual.update(zip(ID.findall(line), ID.findall(same), strict=False))

    def _expected(self, shown: Sequence[str]) -> list[str]:
        """The lines of a page, with what this walk has instead."""
        return [self._with_actual(line) for line in shown]

    def _replaced(self, code: str) -> str:
        for pattern, instead in STAND_INS.items():
            code = re.sub(pattern, instead, code, flags=re.MULTILINE)
        return self._with_actual(code)

    def _with_actual(self, text: str) -> str:
        for word, actual in self._actual.items():
            text = text.replace(word, actual)
        return text

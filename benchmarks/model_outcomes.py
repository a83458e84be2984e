"""Runs one model, unsplit and split, and says how each request ended."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import model_features
from benchmarks.models import IDENTICAL, REFUSED, UNAVAILABLE, WRONG
from benchmarks.named_models import MODELS
from benchmarks.workers import DidNotStart, Workers
from split_common import errors
from split_common.cli import main as command
from split_common.errors import SplitError
from split_device import SplitModelForCausalLM
from split_device.cli.doctor_model import model_findings
from split_worker.bodies.language import SESSION_TOKENS

#: Bytes of memory for keys and values that `Workers` gives each worker.
KV_BYTES = 64 * 1024**2

#: Tokens for which the second worker of a model has memory.
FEW_TOKENS = 192

#: Gets the answers of a model, unsplit or split.
Ask = Callable[..., model_features.Tokens]

#: Seconds for which a device waits for a worker. A session gives way to another one after 10 seconds.
PATIENCE = 60.0


def examine(name: str, broker: str, workers: Workers) -> dict[str, str]:
    """The outcomes of a model, by feature; of `load` alone if it cannot be loaded."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        named = MODELS[name]
        model = named.save(Path(directory))
        whole = named.unsplit(model)
        try:
            pair = stack.enter_context(Pair(whole, model, workers))
            split = SplitModelForCausalLM.from_pretrained(model, broker=broker, dtype="float32", patience=PATIENCE)
            pair.split = stack.enter_context(split)
        except Exception as error:
            return {"load": said(error), "foretold": foretold(model, None, said(error))}
        outcomes = pair.outcomes()
        return {**outcomes, "foretold": foretold(model, pair.packed, outcomes.get("padded", ""))}


class Pair:
    """A model, unsplit and split; its only worker is replaced by another one. A context manager, which kills it."""

    def __init__(self, unsplit: Any, model: Path, workers: Workers) -> None:
        self._unsplit = unsplit
        self._model = model
        self._workers = workers
        #: Set once a worker serves it.
        self.split: Any = None
        #: Whether the worker runs many sessions in one forward.
        self.packed = False
        self._worker = b""

    def __enter__(self) -> Pair:
        self._start(KV_BYTES)
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker:
            self._workers.kill(self._worker)

    def outcomes(self) -> dict[str, str]:
        """How each request ended. `replayed` leaves a worker with little memory to `evicted`."""
        ask = model_features
        assisted = functools.partial(ask.assisted, assistant=self._unsplit)
        greedy = self._compare(ask.greedy)
        if greedy.startswith(UNAVAILABLE):
            return {"greedy": greedy}
        return {
            "greedy": greedy,
            "padded": self._compare(ask.padded),
            "beams": self._compare(ask.beams),
            "lookup": self._compare(ask.lookup, otherwise=ask.repetitive),
            "assisted": self._compare(assisted, otherwise=ask.greedy),
            "multi_turn": self._compare(ask.multi_turn),
            "fork": self._compare(ask.fork),
            "mixed": self._compare(ask.mixed, at_once=ask.SESSIONS),
            "replayed": self._replayed(ask.replayed, kill=self._replace),
            "evicted": self._replayed(ask.evicted),
        }

    def _replayed(self, ask: Ask, **options: Any) -> str:
        """As `_compare`; wrong as well if the split model did not have to send its history again."""
        before = self.split.traffic["replays"]
        outcome = self._compare(ask, **options)
        if outcome == IDENTICAL and self.split.traffic["replays"] == before:
            return f"{WRONG}nothing was replayed"
        return outcome

    def _compare(self, ask: Ask, otherwise: Ask | None = None, **options: Any) -> str:
        """How a request ended.

        Args:
            ask: gets a model's answers.
            otherwise: gets the same answers from the unsplit model if transformers refuses `ask`.
            options: for `ask` of the split model.
        """
        unavailable = None
        try:
            wanted = ask(self._unsplit)
        except Exception as error:
            unavailable = f"{UNAVAILABLE}{_one_line(error)}"
            if otherwise is None:
                return unavailable
            wanted = otherwise(self._unsplit)
        try:
            answers = ask(self.split, **options)
        except Exception as error:
            if unavailable is not None and isinstance(error, (SplitError, ValueError)):
                # Either side may say so: transformers' own `generate` runs in both.
                return unavailable
            return said(error)
        differing = [index for index, pair in enumerate(zip(wanted, answers, strict=True)) if pair[0] != pair[1]]
        return f"{WRONG}answers {differing} of {len(wanted)} differ" if differing else IDENTICAL

    def _replace(self) -> None:
        """Kills the worker, and starts one with memory for `FEW_TOKENS` beside the states of two sessions."""
        facts = self._workers.facts[self._worker]
        session_tokens = min(SESSION_TOKENS, self.split.split_parts.max_positions)
        # A worker says how many sessions fit into its memory, if each has so many tokens, and states.
        states = max(0, facts["kv_tokens"] // (facts["kv_sessions"] + 1) - session_tokens)
        kv_bytes = -(-(FEW_TOKENS + 2 * states) * KV_BYTES // facts["kv_tokens"])
        self._workers.kill(self._worker)
        self._worker = b""
        self._start(kv_bytes)

    def _start(self, kv_bytes: int) -> None:
        self._worker = self._workers.start("--model", str(self._model), "--kv-memory", str(kv_bytes))
        self.packed = self._workers.facts[self._worker]["packed"]


def foretold(model: Path, packed: bool | None, outcome: str) -> str:
    """Whether `inspect` and `doctor --model` say of a model what became of it.

    Args:
        packed: whether a worker runs many sessions in one forward; None if the model cannot be loaded.
        outcome: of padded rows, or of loading it.
    """
    try:
        found = {finding.subject: finding for finding in model_findings(str(model))}
        shown = inspected(model)
    except Exception as error:
        return f"{WRONG}doctor: {type(error).__name__}: {_one_line(error)}"
    detail, status = found["model"].detail, found["model"].status
    if packed is None:
        same = status == "problem" and outcome == f"{REFUSED}{detail}" == f"{REFUSED}{shown['error']['message']}"
    else:
        same = status == ("ok" if packed else "note") and (shown["one_at_a_time"] or "") in detail
        same = same and outcome.startswith(REFUSED) == ("padding" in found)
    return IDENTICAL if same else f"{WRONG}doctor says {status}: {detail}; inspect: {shown}"


def inspected(model: Path) -> dict[str, Any]:
    """What `inspect --json` says of a model, or why it is refused."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        command(["inspect", str(model), "--json"])
    shown: dict[str, Any] = json.loads(out.getvalue())
    return shown


def said(error: Exception) -> str:
    """The outcome of a request that ended by an error: here, or of a worker that did not start."""
    if isinstance(error, DidNotStart):
        name, message = error.error
        refused = issubclass(getattr(errors, name, Exception), SplitError)
    else:
        name, message = type(error).__name__, _one_line(error)
        refused = isinstance(error, SplitError)
    return f"{REFUSED}{message}" if refused else f"{WRONG}{name}: {message}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

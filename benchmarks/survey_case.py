"""What happens to a type of models that is split: a tiny one, with broker, worker and device in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from benchmarks.structure_sizes import LAYERS
from benchmarks.structures import PROMPT, SPECIAL, auto_class, build, tiny_config
from split_broker.broker import Broker
from split_common.errors import SplitError, UnsupportedFeature
from split_common.models.loading import read_spec
from split_common.transport import connect
from split_common.trust.fleet import load_fleet
from split_device import Generator, Request, SplitModelForCausalLM
from split_device.cli.doctor_model import model_findings
from split_device.generation.request import Generation
from split_worker.bodies.loading import load_body
from split_worker.worker import Worker

Verdict = Literal["packed", "one at a time", "refused", "wrong", "error", "hang", "not built"]

#: Layers before and after the body.
HEAD = TAIL = 2
#: Memory for keys and values of the worker, in bytes.
KV_BYTES = 64 * 1024**2
#: Seconds that a step may take, and a worker may be away, before the device gives up.
PATIENCE = 20.0
#: Of sampling.
SEED = 5
#: Largest difference of logits that counts as rounding, relative to the largest logit.
TOLERANCE = 1e-3
#: What a refusal says if another cut would do.
_OTHER_CUT = re.compile(r"--layers (\d+):(-?\d+)")


@dataclass
class Outcome:
    """What was found of a type."""

    verdict: Verdict
    #: Why, unless the verdict is that it runs packed.
    reason: str = ""
    #: The body's layers, if another cut than the usual one was needed.
    layers: str = ""
    #: What does not run although the rest does, and why.
    refused: dict[str, str] = field(default_factory=dict)
    #: What transformers itself does not run, unsplit.
    unsplit_fails: dict[str, str] = field(default_factory=dict)
    #: Whether requests that ran at once got the same tokens.
    at_once: bool = False


def _generate(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    mask = torch.ones_like(tokens) if mask is None else mask
    options = {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": list(SPECIAL), **options}
    return model.generate(tokens, attention_mask=mask, **options)


_PADDED = torch.cat([PROMPT * (torch.arange(PROMPT.shape[1]) >= 4), PROMPT])
_REPEATING = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
_ROWS = torch.randint(3, 80, (8, 40), generator=torch.Generator().manual_seed(3))


def _logits(model: Any) -> torch.Tensor:
    mask = (_PADDED != 0).long()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=_PADDED, attention_mask=mask).logits[mask == 1]
    return logits.float()


def _sizes(model: Any) -> list[Any]:
    """Prompts longer than windows and chunks, and numbers of rows that take different ways through layers."""
    found = []
    with torch.no_grad():
        for tokens in (1, 8, 17, 33):
            row = _ROWS[:1, :tokens]
            logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits
            found.append(logits[0, -1].argmax().item())
    for rows in (3, 4, 8):
        found.append(_generate(model, _ROWS[:rows, :5], max_new_tokens=3).tolist())
    return found


def _many(model: Any) -> list[Any]:
    """Requests at once, of several lengths: two begin alike, one is sampled, and one's tokens are drafted."""
    prompts = [*(_ROWS[row, :length] for row, length in enumerate((3, 12, 40))), _ROWS[1, :20], *_REPEATING]
    configs = [transformers.GenerationConfig(max_new_tokens=6, suppress_tokens=list(SPECIAL)) for _ in prompts]
    configs[2].update(do_sample=True, temperature=0.7, top_k=20)
    # What a checkpoint says is of other types than texts.
    settings = [config.to_diff_dict() | {"eos_token_id": None} for config in configs]
    if not isinstance(model, SplitModelForCausalLM):
        found = []
        for prompt, options in zip(prompts, settings, strict=True):
            torch.manual_seed(SEED)
            found.append(_generate(model, prompt[None], **options)[0, len(prompt) :].tolist())
        return found
    with Generator(model) as generator:
        requests = [
            Request(prompt.tolist(), config, SEED, speculate=drafter)
            for prompt, config, drafter in zip(prompts, configs, ["off"] * 4 + ["ngram"], strict=True)
        ]
        generations = [_submitted(generator, request) for request in requests]
        return [generation.result(PATIENCE) for generation in generations]


def _submitted(generator: Generator, request: Request) -> Generation:
    try:
        return generator.submit(request)
    except UnsupportedFeature:
        # Some models cannot take drafts back, and say so.
        return generator.submit(dataclasses.replace(request, speculate="off"))


#: The feature of requests that run at the same time, in a `Generator`.
AT_ONCE = "at once"

#: What is run, unsplit and split, by name.
FEATURES: dict[str, Callable[[Any], Any]] = {
    "greedy": lambda model: _generate(model, PROMPT).tolist(),
    "left padding": lambda model: _generate(model, _PADDED, (_PADDED != 0).long()).tolist(),
    "beams": lambda model: _generate(model, PROMPT, num_beams=3, num_return_sequences=2).tolist(),
    "prompt lookup": lambda model: _generate(model, _REPEATING, prompt_lookup_num_tokens=4).tolist(),
    "logits": _logits,
    "sizes": _sizes,
    AT_ONCE: _many,
}


def examine(model_type: str, images: bool) -> Outcome:
    """Tries a type in a process of its own: it changes the environment, and its broker ends with the process."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="survey-") as directory:
        for name in ("CONFIG", "CACHE", "STATE", "RUNTIME"):
            place = Path(directory, name.lower())
            place.mkdir(mode=0o700)
            os.environ[f"LAMBDA_SPLIT_{name}"] = str(place)
        checkpoint = Path(directory, "model")
        try:
            build(tiny_config(model_type), images).save_pretrained(checkpoint)
            unsplit = auto_class(model_type, images).from_pretrained(checkpoint).eval()
            unsplit.generation_config.eos_token_id = None
        except Exception as error:
            return Outcome("not built", _told(error))
        outcome = _compare(checkpoint, unsplit)
        _check_doctor(outcome, checkpoint)
        return outcome


def _compare(checkpoint: Path, unsplit: Any, layers: str = f"{HEAD}:{-TAIL}") -> Outcome:
    with contextlib.ExitStack() as stack:
        try:
            model, alone = _joined(stack, checkpoint, layers)
        except SplitError as error:
            other = _OTHER_CUT.search(str(error))
            if other and other[0].split()[1] != layers:
                outcome = _compare(checkpoint, unsplit, f"{other[1]}:{other[2]}")
                outcome.layers = outcome.layers or f"{other[1]}:{other[2]}"
                return outcome
            greedy = _tried(FEATURES["greedy"], unsplit)
            if isinstance(greedy, Exception):
                return Outcome("not built", f"unsplit: {_told(greedy)}")
            return Outcome("refused", _told(error))
        except Exception as error:
            return Outcome("error", _told(error, with_line=True))
        found = {name: _tried(feature, model) for name, feature in FEATURES.items()}
        expected = {name: _tried(feature, unsplit) for name, feature in FEATURES.items()}
    if isinstance(expected["greedy"], Exception):
        return Outcome("not built", f"unsplit: {_told(expected['greedy'])}")
    outcome = Outcome("packed" if alone is None else "one at a time", alone or "")
    for name, value in found.items():
        _judge(outcome, name, expected[name], value)
    runs = outcome.verdict in ("packed", "one at a time") and "greedy" not in outcome.refused
    outcome.at_once = runs and not {AT_ONCE} & {*outcome.refused, *outcome.unsplit_fails}
    if outcome.verdict not in ("wrong", "error") and "greedy" in outcome.refused:
        outcome.verdict, outcome.reason = "refused", outcome.refused["greedy"]
    return outcome


def _check_doctor(outcome: Outcome, checkpoint: Path) -> None:
    """Makes an outcome wrong if `doctor --model` says something else of the checkpoint."""
    wanted = {"packed": "ok", "one at a time": "note", "refused": "problem"}.get(outcome.verdict)
    if wanted is None or "greedy" in outcome.refused:
        return
    try:
        said = [finding for finding in model_findings(str(checkpoint)) if finding.subject == "model"]
    except Exception as error:
        outcome.verdict, outcome.reason = "error", f"doctor: {_told(error, with_line=True)}"
        return
    if [finding.status for finding in said] != [wanted]:
        details = "; ".join(f"{finding.status}: {finding.detail}" for finding in said)
        outcome.verdict, outcome.reason = "wrong", f"{outcome.verdict}, but doctor says: {details}"


def _judge(outcome: Outcome, name: str, expected: Any, found: Any) -> None:
    """Notes in an outcome what a feature did split, beside what it does unsplit."""
    if isinstance(expected, Exception):
        outcome.unsplit_fails[name] = _told(expected)
    elif isinstance(found, SplitError):
        outcome.refused[name] = _told(found)
    elif isinstance(found, Exception):
        outcome.verdict, outcome.reason = "error", f"{name}: {_told(found, with_line=True)}"
    elif outcome.verdict != "error" and not _same(expected, found):
        outcome.verdict, outcome.reason = "wrong", f"{name} differs"


def _joined(stack: contextlib.ExitStack, checkpoint: Path, layers: str) -> tuple[Any, str | None]:
    """A split model, and why its worker runs rows one at a time. The stack ends the worker and the broker."""
    fleet = load_fleet()
    split = read_spec(str(checkpoint)), layers
    first, last = (int(end) for end in split[1].split(":"))
    broker = Broker("tcp://127.0.0.1:*", fleet)
    broker.start()
    stack.callback(broker.stop)
    serving = load_body(str(checkpoint), fleet, layers=layers, device=torch.device("cpu"), memory=KV_BYTES)
    identity = fleet.identity("worker")
    transport = connect(broker.address, fleet, identity)
    worker = Worker(serving.body, serving.service, serving.model, identity, fleet, transport)
    worker.start()
    stack.callback(worker.stop)
    tail = -last if last < 0 else LAYERS - last
    model = SplitModelForCausalLM.from_pretrained(
        checkpoint,
        broker=broker.address,
        head_layers=first,
        tail_layers=tail,
        patience=PATIENCE,
        step_timeout=PATIENCE,
    )
    stack.enter_context(model)
    model.generation_config.eos_token_id = None
    return model, serving.body.runner.unpacked_because


def _tried(feature: Callable[[Any], Any], model: Any) -> Any:
    """What a feature gives, or the exception that it raises."""
    torch.manual_seed(0)
    try:
        return feature(model)
    except Exception as error:
        return error


def _same(expected: Any, found: Any) -> bool:
    if not isinstance(expected, torch.Tensor):
        return bool(expected == found)
    limit = TOLERANCE * float(expected.abs().max())
    return expected.shape == found.shape and float((expected - found).abs().max()) <= limit


def _told(error: BaseException, with_line: bool = False) -> str:
    """An exception on one line, without the names of temporary directories."""
    text = re.sub(r"/\S*/survey-\w+/", "", " ".join(str(error).split()))[:300]
    if isinstance(error, SplitError):
        return text
    where = ""
    if with_line:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({Path(frame.filename).name}:{frame.lineno})"
    return f"{type(error).__name__}: {text}{where}"

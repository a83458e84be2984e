"""How many tokens a round trip gives with each drafter, on recorded greedy answers of the unsplit model.

No worker takes part: a trip commits the draft's tokens that the model has chosen, and the one after them. The first
token of an answer comes with the prompt and does not count. `chain` is one continuation, as a `Generator` sends it,
and `tree` several; the budget is the most tokens of a draft. Requests of one kind follow each other and share what
they learn; with `cold` none does. What the model would have said about rejected drafts was not recorded, so they
teach nothing here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import arguments, checkpoint, note, report
from benchmarks.prompts import KINDS, PROMPTS
from benchmarks.recorded_answers import Answer, load, record, save
from split_common.system.process import passive_threads

BUDGETS = (4, 8, 16, 32)
NEW_TOKENS = 192

#: Of `--quick`.
QUICK_PROMPTS = 2
QUICK_TOKENS = 32

#: Of which `cold` tells.
COLD_DRAFTER = "suffix-recycle"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="few prompts and tokens")
    parser.add_argument("--tokens", type=int, help=f"most tokens of an answer; default: {NEW_TOKENS}")
    parser.add_argument("--recording", type=Path, help="a file of answers, which is written if it is not there")
    options = parser.parse_args()
    passive_threads()
    model = checkpoint(options)
    if options.recording is not None and options.recording.exists():
        answers = load(options.recording)
    else:
        tokens = options.tokens or (QUICK_TOKENS if options.quick else NEW_TOKENS)
        answers = record(model, QUICK_PROMPTS if options.quick else PROMPTS, tokens)
        if options.recording is not None:
            save(answers, options.recording)
    report(measure(answers, _vocabulary(model)), options.json, "tokens per round trip")


def measure(answers: dict[str, list[Answer]], vocabulary: int) -> dict[str, Any]:
    from split_device.speculation.drafters import DRAFTERS

    found: dict[str, Any] = {kind: {name: {} for name in DRAFTERS} for kind in KINDS}
    milliseconds: dict[str, dict[str, float]] = {name: {} for name in DRAFTERS}
    cold: dict[str, float] = {}
    for kind, some in answers.items():
        taught = [(each, each.logits(vocabulary)) for each in some]
        for name in DRAFTERS:
            # Prompt lookup has one continuation.
            for shape in ("chain", "tree") if name in ("recycle", COLD_DRAFTER) else ("chain",):
                rates = {}
                for budget in BUDGETS:
                    rates[str(budget)], milliseconds[name][shape] = _rate(taught, name, shape, budget)
                found[kind][name][shape] = rates
                note(f"{kind}, {name}, {shape}: " + ", ".join(f"{key}: {rate:.2f}" for key, rate in rates.items()))
        cold[kind], _ = _rate(taught, COLD_DRAFTER, "tree", BUDGETS[-1], shared=False)
    return {
        "tokens_per_round_trip": found,
        "cold": cold,
        "draft_ms": milliseconds,
        "answer_tokens": {kind: sum(len(each.tokens) for each in some) for kind, some in answers.items()},
    }


def _rate(
    taught: Sequence[tuple[Answer, Any]], name: str, shape: str, budget: int, shared: bool = True
) -> tuple[float, float]:
    """Tokens per trip over all answers, and milliseconds that the drafter took for each trip."""
    from split_device.speculation.drafters import make_drafter
    from split_device.speculation.recycle import Successors

    successors = Successors()
    tokens = trips = 0
    seconds = 0.0
    for answer, logits in taught:
        drafter = make_drafter(name, successors if shared else Successors())
        began = time.perf_counter()
        trips += _trips(answer, logits, drafter, shape, budget)
        seconds += time.perf_counter() - began
        tokens += len(answer.tokens) - 1
    return tokens / max(1, trips), 1000 * seconds / max(1, trips)


def _trips(answer: Answer, logits: Any, drafter: Any, shape: str, budget: int) -> int:
    """How many trips an answer takes after its first token."""
    from split_device.speculation.tree import DraftTree

    text = answer.tokens
    drafter.extend([*answer.prompt, text[0]])
    drafter.learn(answer.prompt[-1:], logits[:1])
    trips, here = 0, 1
    while here < len(text):
        if shape == "tree":
            tree = drafter.draft_tree(budget)
        else:
            chain = drafter.draft(budget)
            tree = DraftTree(chain, [*range(-1, len(chain) - 1)])
        assert len(tree.tokens) <= budget
        end = min(here + tree.matched(text[here:]) + 1, len(text))
        drafter.learn(text[here - 1 : end - 1], logits[here:end])
        drafter.extend(text[here:end])
        trips, here = trips + 1, end
    return trips


def _vocabulary(model: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).get_text_config().vocab_size)


if __name__ == "__main__":
    main()

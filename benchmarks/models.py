"""Which language models run split: tiny random ones of 24 structures, through processes of broker and workers.

Each is asked what `benchmarks/model_features.py` lists, unsplit and split, in float32. It is `identical` if all
answers are the same tokens; `refused`, with the reason, if an error of the product says that it does not do what
transformers does; and `wrong` if an answer differs, if another error comes, or if `inspect` and `doctor --model`
say something else of it (`foretold`). `features` says how each request of each model ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import cpu_name, note
from benchmarks.workers import Workers
from split_common.system.process import passive_threads, running_command

#: How a request ends. All but the first go on with the reason.
IDENTICAL, REFUSED, UNAVAILABLE, WRONG = "identical", "refused: ", "not in transformers: ", "wrong: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument("--only", metavar="NAME,NAME,…", help="some of the models")
    options = parser.parse_args()
    passive_threads()
    from transformers.utils import logging

    from benchmarks.model_outcomes import examine
    from benchmarks.named_models import MODELS

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    names = options.only.split(",") if options.only else list(MODELS)
    if unknown := sorted(set(names) - set(MODELS)):
        parser.error(f"unknown models {', '.join(unknown)}: expected some of {', '.join(MODELS)}")
    features: dict[str, dict[str, str]] = {}
    with fleet() as (broker, workers):
        for name in names:
            before = time.monotonic()
            features[name] = examine(name, broker, workers)
            note(f"{name}: {verdict(features[name])}, in {time.monotonic() - before:.0f} s")
    results = summary(features)
    if options.json:
        print(json.dumps({"cpu": cpu_name(), **results, "features": features}), flush=True)
    else:
        Console(highlight=False).print(_table(features))


@contextlib.contextmanager
def fleet() -> Iterator[tuple[str, Workers]]:
    """Runs a broker; yields its address, and what starts workers of it."""
    with (
        running_command(["broker", "--bind", "tcp://127.0.0.1:*"]) as (_, broker),
        Workers("--broker", broker["address"], "--dtype", "float32") as workers,
    ):
        yield broker["address"], workers


def verdict(outcomes: dict[str, str]) -> str:
    """The outcome of a model: the first one that is wrong, else the first that is refused, else `IDENTICAL`."""
    if outcomes.get("greedy", "").startswith(UNAVAILABLE):
        return f"{WRONG}the unsplit model fails: {outcomes['greedy'].removeprefix(UNAVAILABLE)}"
    for kind in (WRONG, REFUSED):
        for feature, outcome in outcomes.items():
            if outcome.startswith(kind):
                return f"{kind}{feature}: {outcome.removeprefix(kind)}"
    return IDENTICAL


def summary(features: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Each name in the list `identical`, in the list `wrong`, or with the reason in the map `refused`."""
    verdicts = {name: verdict(outcomes) for name, outcomes in features.items()}
    return {
        "identical": [name for name, said in verdicts.items() if said == IDENTICAL],
        "refused": {
            name: said.removeprefix(REFUSED) for name, said in verdicts.items() if said.startswith(REFUSED)
        },
        "wrong": [name for name, said in verdicts.items() if said.startswith(WRONG)],
    }


def _table(features: dict[str, dict[str, str]]) -> Table:
    table = Table("model", "outcome", title="split and unsplit, token by token")
    for name, outcomes in features.items():
        table.add_row(name, verdict(outcomes))
    return table


if __name__ == "__main__":
    main()

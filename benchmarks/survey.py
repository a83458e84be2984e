"""Which types of models run split: a tiny random one of every type that transformers knows is tried.

Each is tried in a process of its own with a time limit. Greedy decoding, a left-padded pair, three beams, prompt
lookup, logits, long prompts, many rows, and requests at once in a `Generator` are compared with the unsplit model,
and what `doctor --model` says with what runs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.harness import note
from benchmarks.survey_page import PAGE, merged, page, results, summary

#: Seconds that one type may take.
LIMIT = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument("--write", action="store_true", help=f"write what is found into {PAGE.name}")
    parser.add_argument("--only", metavar="TYPES", help="types to try, with commas between them; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="types tried at once")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that one type may take")
    parser.add_argument("--output", type=Path, help="also append each type's outcome to this file of JSON lines")
    options = parser.parse_args()
    only = options.only.split(",") if options.only else None
    old = results(PAGE.read_text()) if options.write and only else None
    found = survey(only, options.jobs, options.output, options.limit)
    if old is not None and old["transformers"] != found["transformers"]:
        parser.error(f"{PAGE.name} is of transformers {old['transformers']}: --write needs all types")
    if options.write:
        PAGE.write_text(page(found if old is None else merged(old, found)))
    print(json.dumps(found) if options.json else summary(found), flush=True)


def survey(
    only: Sequence[str] | None = None, jobs: int = 1, output: Path | None = None, limit: float = LIMIT
) -> dict[str, Any]:
    """Tries types of models.

    Args:
        only: their names; None for all.
        jobs: how many are tried at once.
        output: a file to which each outcome is appended, as a line of JSON.
        limit: seconds that one may take.

    Returns:
        `transformers`, its version; `causal` and `image_text`, for each type the fields of its `Outcome`.
    """
    import transformers

    from benchmarks.structures import causal_types, image_text_types

    types = {"causal": causal_types(), "image_text": image_text_types()}
    tried = [(kind, name) for kind, names in types.items() for name in names if only is None or name in only]
    found: dict[str, Any] = {"transformers": transformers.__version__, **{kind: {} for kind in types}}
    # A server that has imported everything once; each type gets a fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.survey_case"])
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        outcomes = pool.map(functools.partial(_try, context, limit), *zip(*tried, strict=True))
        for (kind, name), outcome in zip(tried, outcomes, strict=True):
            found[kind][name] = outcome
            note(f"{name} ({kind}): {outcome['verdict']} {outcome['reason']} {outcome['refused'] or ''}".rstrip())
            if output is not None:
                with output.open("a") as file:
                    file.write(json.dumps({"type": name, "kind": kind, **outcome}) + "\n")
    return found


def _try(context: Any, limit: float, kind: str, name: str) -> dict[str, Any]:
    """The fields of a type's outcome, from a process that ends after `limit` seconds."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_examine, args=(theirs, name, kind == "image_text"), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            return _failed("hang", f"not done after {limit:.0f} seconds")
        outcome: dict[str, Any] = ours.recv()
        return outcome
    except EOFError:
        process.join()
        return _failed("error", f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _failed(verdict: str, reason: str) -> dict[str, Any]:
    return {
        "verdict": verdict,
        "reason": reason,
        "layers": "",
        "refused": {},
        "unsplit_fails": {},
        "at_once": False,
    }


def _examine(connection: Connection, name: str, images: bool) -> None:
    from benchmarks.survey_case import examine

    connection.send(dataclasses.asdict(examine(name, images)))


if __name__ == "__main__":
    main()

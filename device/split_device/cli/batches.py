"""What `jobs` and `agent` show of batches, and do with one of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from split_common.errors import AgentError, ConfigError, UnknownJob
from split_common.system.console import emit_json, print_text, stderr, stdout
from split_common.system.outputs import check_output, output_name
from split_device.batches.outputs import formatted, output_form, result_object, write_results
from split_device.batches.place import find_batch, is_batch, places
from split_device.batches.results import results
from split_device.batches.shown import batch_facts, opened
from split_device.batches.shown import cancel as cancel_batch
from split_device.cli.batch_progress import ProgressMode, batch_progress
from split_device.cli.terminal import AgentNotices
from split_device.jobs.agent import running_agent
from split_device.jobs.follow import AGENT_GRACE

#: Interval between two looks at a batch that is watched, in seconds.
WATCH_INTERVAL = 0.5


def all_batches(store_key: Path | None) -> list[dict[str, Any]]:
    """The facts of all batches that are not forgotten, the oldest first."""
    return [batch_facts(place, record, store_key) for place, record in places()]


def batches_among(jobs: list[str] | None) -> list[str]:
    """The names, if they are those of batches; none if they are ids of jobs. Raises ConfigError for both."""
    names = [name for name in jobs or () if is_batch(name)]
    if names and len(names) < len(jobs or ()):
        raise ConfigError("name jobs, or batches, but not both")
    return list(dict.fromkeys(names))


def print_batches(batches: list[dict[str, Any]]) -> None:
    """Prints a table of batches, if there are any."""
    if not batches:
        return
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for column in ("batch", "state", "answers", "from", "to"):
        table.add_column(column, no_wrap=column in ("batch", "state"))
    for facts in batches:
        names = [Path(facts[end]).name for end in ("source", "output")]
        table.add_row(facts["name"], facts["state"], _answers(facts), *names)
    stdout().print(table)


def _answers(facts: dict[str, Any]) -> str:
    """How many answers there are so far: `112 of 500, 2 failed`."""
    done = "?" if facts["done"] is None else facts["done"]
    words = "".join(f", {facts[state]} {state}" for state in ("failed", "cancelled") if facts[state])
    return f"{done} of {facts['answers']}{words}"


def show_batch(name: str, store_key: Path | None, json: bool) -> None:
    """Shows everything about a batch except its prompts and answers. Raises UnknownJob."""
    facts = batch_facts(*find_batch(name), store_key)
    if json:
        emit_json(facts)
        return
    for key, value in facts.items():
        if value is not None:
            print_text(f"{key}: {value}")


def batch_result(name: str, output: Path | None, store_key: Path | None, json: bool) -> None:
    """Prints the answers that a batch has so far, in the order of its lines, or writes them to a file.

    Raises:
        JobsError: there is no such batch, or its store is gone.
        ConfigError: the file cannot be written.
    """
    if output is not None:
        check_output(output)
    with opened(name, store_key) as (place, record, plan, store):
        found = results(plan, store, ended=True)
        if output is not None:
            written = write_results(output, output_form(output), found)
            stderr.print(f"{output_name(output)}: {written.lines} of {record.lines} lines", soft_wrap=True)
        elif not json:
            for line in formatted(record.output_form, found):
                print_text(line, end="")
            stderr.print(f"answered: {_answers(batch_facts(place, record, store_key))}", soft_wrap=True)
        if json:
            facts = batch_facts(place, record, store_key)
            emit_json(facts | {"results": [result_object(result) for result in results(plan, store, ended=True)]})


def watch_batch(name: str, progress: ProgressMode, store_key: Path | None, json: bool) -> None:
    """Shows how far a batch is until it has ended; exit code 1 if any line has an error then.

    Raises:
        UnknownJob: there is no such batch.
        AgentError: nobody works on it.
    """
    place, record = find_batch(name)
    facts = batch_facts(place, record, store_key)
    worked_at, notices = time.monotonic(), AgentNotices()
    shown: ProgressMode = "none" if json else progress
    try:
        with batch_progress(shown, name, record.jobs, lambda: facts["tokens"] or 0) as advance:
            while facts["state"] != "ended":
                advance(facts["done"] or 0, facts["failed"] or 0)
                if facts["problem"] is not None:
                    raise AgentError(f"{name} cannot go on: {facts['problem']}")
                if facts["state"] == "running":
                    worked_at = time.monotonic()
                    if facts["detached"]:
                        notices.show()
                elif time.monotonic() - worked_at > AGENT_GRACE and running_agent() is None:
                    raise AgentError(f"{name} is interrupted, and no agent is running: {_how_to_go_on(facts)}")
                time.sleep(WATCH_INTERVAL)
                facts = _facts_now(name, store_key, facts)
            advance(facts["done"] or 0, facts["failed"] or 0)
    except KeyboardInterrupt:
        if facts["state"] == "running":
            stderr.print("the batch goes on: `lambda-split jobs list` shows how far it is", soft_wrap=True)
        raise
    if json:
        emit_json(facts)
    else:
        cancelled = min(facts["cancelled"] or 0, facts["errors"])
        counts = {"failed": facts["errors"] - cancelled, "cancelled": cancelled}
        words = "".join(f", {count} {state}" for state, count in counts.items() if count)
        stderr.print(f"{facts['output']}: {facts['lines'] - facts['errors']} answered{words}", soft_wrap=True)
    if facts["errors"]:
        raise typer.Exit(1)


def _facts_now(name: str, store_key: Path | None, before: dict[str, Any]) -> dict[str, Any]:
    """The facts of a batch that was there before: without errors, one in the foreground is forgotten at its end."""
    try:
        return batch_facts(*find_batch(name), store_key)
    except UnknownJob:
        return before | {"state": "ended", "errors": 0, "cancelled": 0, "done": before["answers"]}


def _how_to_go_on(facts: dict[str, Any]) -> str:
    return "`lambda-split agent start` starts one" if facts["detached"] else "run its command again"


def cancel_batches(names: list[str], store_key: Path | None, json: bool) -> None:
    """Cancels batches: their files get the answers so far. Raises JobsError if one has ended."""
    for name in names:
        cancel_batch(name, store_key)
    if json:
        emit_json({"batches": [batch["name"] for batch in all_batches(store_key) if batch["name"] in names]})
        return
    for name in names:
        stderr.print(f"{name} is cancelled; its file gets the answers so far", soft_wrap=True)

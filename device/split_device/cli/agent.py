"""`lambda-split agent …`: the process that runs jobs in the background."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Annotated

import typer

from split_common.cli.groups import grouped
from split_common.cli.options import JsonOption, given_words, old_name
from split_common.errors import AgentError, ConfigError
from split_common.system.console import doing, emit_json, saying_stop, stderr
from split_common.system.lock import Held, holding
from split_common.system.process import allow_many_files, passive_threads
from split_common.system.signals import catch_sigterm
from split_device.batches.finish import prune as prune_batches
from split_device.cli.batches import all_batches, print_batches
from split_device.cli.groups import ConnectionOptions, HardwareOptions, LimitOptions
from split_device.cli.options import GIVE_UP, GiveUpOption, KeepOption, StoreKeyOption, parse_age
from split_device.jobs import agent, waits
from split_device.jobs.notify import Notifier
from split_device.jobs.shown import shown_counts
from split_device.jobs.store import Store, store_path

if TYPE_CHECKING:
    from split_device.batches.detached import DetachedBatches
    from split_device.jobs.runner import JobRunner

app = typer.Typer(no_args_is_help=True, help="Run this user's jobs in the background.", rich_markup_mode="markdown")

OldGraceOption = Annotated[float | None, old_name("--timeout", "--grace", "SECONDS")]

#: Interval between two removals of old jobs, and two looks at the length of the log, in seconds.
PRUNE_INTERVAL = 60.0

#: Interval between two reads of a log that is followed, in seconds.
LOG_INTERVAL = 0.2


@app.command()
@grouped
def run(
    connection: ConnectionOptions,
    hardware: HardwareOptions,
    limits: LimitOptions,
    give_up: GiveUpOption = GIVE_UP,
    keep: KeepOption = None,
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Run jobs in the foreground, until Ctrl-C or SIGTERM.

    Jobs that are running then are interrupted, and resume when an agent runs again. With --json, one object is
    printed when the agent is ready.
    """
    passive_threads()
    max_age = parse_age(keep) if keep is not None else None
    stop = catch_sigterm()
    try:
        with holding(agent.lock_path()), Store(store_path(), store_key) as store:
            resumed = store.recover()
            with doing("loading torch"):
                from split_device.batches.detached import DetachedBatches
                from split_device.jobs.models import Models
                from split_device.jobs.runner import JobRunner

            if json:
                emit_json({"pid": os.getpid(), "store": str(store.path), "jobs": shown_counts(store.count())})
            stderr.print(f"agent {os.getpid()} runs the jobs of {store.path}; resumed: {resumed}", soft_wrap=True)
            waits.over()
            connection = dataclasses.replace(connection, on_notice=waits.say)
            allow_many_files()
            with Models(connection, limits, hardware) as models:
                batches = DetachedBatches(models, give_up, store_key, waits.say, waits.over)
                runner = JobRunner(store, models, give_up, waits.say, waits.over)
                _work(runner, batches, store, max_age, stop)
    except Held as held:
        raise AgentError(f"an agent is already running (process {held.pid})") from None


def _work(
    runner: JobRunner, batches: DetachedBatches, store: Store, max_age: int | None, stop: threading.Event
) -> None:
    """Runs jobs, and lines of batches where jobs leave room, until the event is set.

    Args:
        max_age: how long jobs are kept after they have ended, in seconds; None for no limit.
    """
    from split_device.jobs.runner import WRITE_INTERVAL

    notifier = Notifier(store)
    prune_at = 0.0
    in_background = agent.logs_to_file()
    try:
        with saying_stop("what runs is interrupted, and goes on when an agent runs again"):
            while not stop.is_set():
                runner.begin()
                batches.begin(runner.running)
                time.sleep(WRITE_INTERVAL)
                runner.write()
                batches.write()
                notifier.turn()
                if time.monotonic() >= prune_at:
                    if max_age is not None:
                        store.prune(time.time() - max_age)
                        prune_batches(time.time() - max_age)
                    if in_background:
                        agent.trim_log()
                    prune_at = time.monotonic() + PRUNE_INTERVAL
    except KeyboardInterrupt:
        if not stop.is_set():
            raise
    finally:
        try:
            notifier.stop()
            batches.stop()
        finally:
            runner.stop()


@app.command()
@grouped
def start(
    context: typer.Context,
    connection: ConnectionOptions,
    hardware: HardwareOptions,
    limits: LimitOptions,
    give_up: GiveUpOption = GIVE_UP,
    keep: KeepOption = None,
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Run jobs in the background; returns when the agent is ready. Does nothing if one is already running."""
    # The options are those of `agent run`, in this directory and this environment. An address may hold a password,
    # and the arguments of a process are everybody's to read.
    options = given_words(context, but=["--json", "--broker"])
    if keep is not None:
        parse_age(keep)
    if (pid := agent.running_agent()) is None:
        try:
            with doing("starting an agent"):
                facts = agent.start(options, {"LAMBDA_SPLIT_BROKER": connection.broker})
        except AgentError:
            # Another command may have started one at the same time.
            if (pid := agent.running_agent()) is None:
                raise
    if pid is not None:
        with Store(store_path(), store_key) as store:
            counts = shown_counts(store.count())
        facts = {"pid": pid, "store": str(store_path()), "jobs": counts}
    if json:
        emit_json(facts | {"started": pid is None})
    elif pid is None:
        stderr.print(f"agent {facts['pid']} is running; its log is {agent.log_path()}", soft_wrap=True)
    else:
        stderr.print(f"an agent is already running (process {pid}), with the options that it was started with")


@app.command()
def stop(
    grace: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="How long to wait for the agent to end.")
    ] = 60.0,
    timeout: OldGraceOption = None,
    json: JsonOption = False,
) -> None:
    """Stop the agent; the jobs that it runs resume when it is started again."""
    waiting = doing("stopping the agent") if agent.running_agent() is not None else contextlib.nullcontext()
    with waiting:
        pid = agent.stop(grace if timeout is None else timeout)
    if json:
        emit_json({"stopped": pid})
    else:
        stderr.print("no agent is running" if pid is None else f"agent {pid} has ended")


@app.command()
def status(store_key: StoreKeyOption = None, json: JsonOption = False) -> None:
    """Show whether an agent is running, and how many jobs there are. Exit code 1 if no agent is."""
    pid = agent.running_agent()
    with Store(store_path(), store_key) as store:
        counts = store.count()
    batches = all_batches(store_key)
    if json:
        emit_json({"running": pid is not None, "pid": pid, "jobs": shown_counts(counts), "batches": batches})
    else:
        print("no agent is running" if pid is None else f"agent {pid} is running")
        print(", ".join(f"{count} {state}" for state, count in shown_counts(counts).items()))
        print_batches(batches)
    if pid is None:
        raise typer.Exit(1)


@app.command()
def logs(
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, metavar="N", help="Number of lines from the end of the log.")
    ] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Also show new lines, until Ctrl-C.")] = False,
) -> None:
    """Show the log of agents that ran in the background. It holds neither prompts nor answers."""
    try:
        with agent.log_path().open(encoding="utf-8", errors="replace") as file:
            sys.stdout.writelines(file.readlines()[-lines:] if lines else [])
            while follow:
                if file.tell() > os.fstat(file.fileno()).st_size:
                    file.seek(0)  # It was moved away: see `agent.trim_log`.
                sys.stdout.write(file.read())
                sys.stdout.flush()
                time.sleep(LOG_INTERVAL)
    except FileNotFoundError:
        raise ConfigError("there is no log: no agent has run in the background") from None

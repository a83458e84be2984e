"""`lambda-split agent …`: the process that runs jobs in the background."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from split_common.cli.options import (
    DEFAULT_BROKER,
    BrokerOption,
    JsonOption,
    KeysOption,
    MemberOption,
    TimeoutOption,
    parse_size,
)
from split_common.console import emit_json, stderr
from split_common.errors import AgentError, ConfigError
from split_common.process import catch_sigterm, passive_threads
from split_device.jobs import agent
from split_device.jobs.lock import Held, holding
from split_device.jobs.options import (
    GIVE_UP,
    ConcurrencyOption,
    GiveUpOption,
    KeepOption,
    KvMemoryOption,
    MaxImagesOption,
    StoreKeyOption,
    parse_age,
)
from split_device.jobs.store import Store, store_path
from split_device.options import PatienceOption

app = typer.Typer(no_args_is_help=True, help="Run this user's jobs in the background.", rich_markup_mode="markdown")

#: Seconds between two removals of jobs that ended long ago.
PRUNE_INTERVAL = 60.0

#: Seconds between two looks at whether a log has grown.
LOG_INTERVAL = 0.2


@app.command()
def run(
    broker: BrokerOption = DEFAULT_BROKER,
    max_jobs: ConcurrencyOption = 64,
    max_images: MaxImagesOption = 2,
    kv_memory: KvMemoryOption = None,
    give_up: GiveUpOption = GIVE_UP,
    keep: KeepOption = None,
    store_key: StoreKeyOption = None,
    keys: KeysOption = None,
    member: MemberOption = None,
    timeout: TimeoutOption = 10.0,
    patience: PatienceOption = 60.0,
    json: JsonOption = False,
) -> None:
    """Run jobs in the foreground, until Ctrl-C or SIGTERM.

    What runs then is broken off and goes on from there when an agent runs again. With --json one object is printed
    when it is ready.
    """
    passive_threads()
    memory = parse_size(kv_memory) if kv_memory is not None else None
    kept = parse_age(keep) if keep is not None else None
    stop = catch_sigterm()
    try:
        with holding(agent.lock_path()), Store(store_path(), store_key) as store:
            left = store.recover()
            from split_device.jobs.models import Limits, Models, Queue
            from split_device.jobs.runner import Runner

            facts = {"pid": os.getpid(), "store": str(store.path), "jobs": store.count()}
            if json:
                emit_json(facts)
            stderr.print(f"agent {os.getpid()} runs the jobs of {store.path}; {left} go on", soft_wrap=True)
            queue = Queue(broker, keys, member, timeout, patience)
            with Models(queue, Limits(max_jobs, memory, max_images)) as models:
                runner = Runner(store, models, give_up)
                try:
                    prune_at = 0.0
                    while not stop.is_set():
                        runner.turn()
                        if kept is not None and time.monotonic() >= prune_at:
                            store.prune(time.time() - kept)
                            prune_at = time.monotonic() + PRUNE_INTERVAL
                except KeyboardInterrupt:
                    if not stop.is_set():
                        raise
                finally:
                    runner.stop()
    except Held as held:
        raise AgentError(f"an agent runs already, process {held.pid}") from None


@app.command()
def start(
    broker: BrokerOption = DEFAULT_BROKER,
    max_jobs: ConcurrencyOption = 64,
    max_images: MaxImagesOption = 2,
    kv_memory: KvMemoryOption = None,
    give_up: GiveUpOption = GIVE_UP,
    keep: KeepOption = None,
    store_key: StoreKeyOption = None,
    keys: KeysOption = None,
    member: MemberOption = None,
    timeout: TimeoutOption = 10.0,
    patience: PatienceOption = 60.0,
    json: JsonOption = False,
) -> None:
    """Run jobs in the background; returns when the agent is ready."""
    given: dict[str, object] = {
        "--broker": broker,
        "--max-jobs": max_jobs,
        "--max-images": max_images,
        "--kv-memory": kv_memory,
        "--give-up": give_up,
        "--keep": keep,
        "--store-key": _absolute(store_key),
        "--keys": _absolute(keys),
        "--member": member,
        "--timeout": timeout,
        "--patience": patience,
    }
    options = [str(word) for name, value in given.items() if value is not None for word in (name, value)]
    facts = agent.start(options)
    if json:
        emit_json(facts)
    else:
        stderr.print(f"agent {facts['pid']} runs; its log is {agent.log_path()}", soft_wrap=True)


@app.command()
def stop(
    timeout: Annotated[float, typer.Option(min=0.0, metavar="SECONDS", help="To wait for its end.")] = 60.0,
    json: JsonOption = False,
) -> None:
    """End the agent; what it runs goes on from there when it is started again."""
    pid = agent.stop(timeout)
    if json:
        emit_json({"stopped": pid})
    else:
        stderr.print("no agent runs" if pid is None else f"agent {pid} has ended")


@app.command()
def status(store_key: StoreKeyOption = None, json: JsonOption = False) -> None:
    """Show whether an agent runs, and how many jobs there are. Exit code 1 if none runs."""
    pid = agent.running_agent()
    with Store(store_path(), store_key) as store:
        counts = store.count()
    if json:
        emit_json({"running": pid is not None, "pid": pid, "jobs": counts})
    else:
        print("no agent runs" if pid is None else f"agent {pid} runs")
        print(", ".join(f"{count} {state}" for state, count in counts.items()))
    if pid is None:
        raise typer.Exit(1)


@app.command()
def logs(
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, metavar="N", help="The last so many.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
) -> None:
    """Show the log of agents that ran in the background. It holds neither prompts nor answers."""
    try:
        with agent.log_path().open() as file:
            sys.stdout.writelines(file.readlines()[-lines:] if lines else [])
            while follow:
                sys.stdout.write(file.read())
                sys.stdout.flush()
                time.sleep(LOG_INTERVAL)
    except FileNotFoundError:
        raise ConfigError("there is no log: no agent has run in the background") from None


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()

"""The `lambda-split stress` command."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from split_common.address import is_redis
from split_common.cli.options import MODEL_PANEL, QUEUE_PANEL, JsonOption, KeysOption
from split_common.console import emit_json, stderr, stdout
from split_common.errors import ConfigError
from split_common.process import passive_threads
from split_device.diffusion.options import need_diffusers
from split_device.options import HeadOption, TailOption
from split_device.stress.plan import Plan, TransportName, Workload

#: Faults that can be asked for.
KINDS = ("kill", "stop", "broker", "lag", "drop", "corrupt")


def stress(
    devices: Annotated[int, typer.Option(min=1, metavar="N", help="Device processes.")] = 8,
    requests: Annotated[int, typer.Option(min=1, metavar="N", help="Requests of each device.")] = 25,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=1, metavar="SECONDS", help="Make requests for so long, however many; what has begun is ended."
        ),
    ] = None,
    workload: Annotated[
        Workload,
        typer.Option(help="What devices ask for; mixed: every other device and worker has images."),
    ] = "text",
    workers: Annotated[
        int, typer.Option(min=0, metavar="N", help="Worker processes. 0 only with --broker, for those there.")
    ] = 3,
    chaos: Annotated[
        str | None,
        typer.Option(
            metavar="KINDS",
            help="Faults, separated by commas: kill and stop (workers), broker (killed and started again), lag, "
            "drop and corrupt (connections); or none. Default: all that are possible.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Draws requests, faults and the random model.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw throughput over time, with the faults, e.g. as out.png."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=MODEL_PANEL,
            help="Directory or hub id of a checkpoint; of images the directory of a pipeline or a UNet. Default: a "
            "small random one, soon loaded.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=MODEL_PANEL,
            help="Compare with this unsplit checkpoint instead of the same one.",
        ),
    ] = None,
    head_layers: HeadOption = 2,
    tail_layers: TailOption = 2,
    transport: Annotated[
        TransportName, typer.Option(rich_help_panel=QUEUE_PANEL, help="Start a ZeroMQ broker or a Redis server.")
    ] = "zmq",
    broker: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", rich_help_panel=QUEUE_PANEL, help="Join this queue and start none."),
    ] = None,
    keys: KeysOption = None,
    json: JsonOption = False,
) -> None:
    """Run a fleet of processes under faults, and compare every output with the unsplit model's.

    Starts a queue, workers and devices on this machine. Workers are killed (SIGKILL) and stopped (SIGSTOP) and the
    queue's server is killed; all are started again. Connections pass a proxy that delays, resets, truncates,
    swallows and corrupts. When the faults happen is drawn from the seed. The first Ctrl-C ends the time, a second
    one ends everything.

    In the report a request is *lost* that ended with an error, or with its process, or not at all; *duplicated*
    counts outputs beyond the first to one request, and outputs of more tokens than the unsplit model's;
    *mismatched* counts outputs that are not the unsplit model's, token for token; of images those whose latents
    differ by more than 1e-5 of their largest number (images that share a forward round differently). The exit code
    is 1 if any of them is not 0, or if nothing was completed.
    """
    if workers == 0 and broker is None:
        raise ConfigError("--workers 0 needs --broker: there are no workers but those that are started here")
    if broker is not None and model is None and workers == 0:
        raise ConfigError("--workers 0 needs --model: the workers there serve no random one")
    if keys is not None and broker is None:
        raise ConfigError("--keys goes with --broker: a fleet that is started here has keys of its own")
    if workload == "mixed" and (model is not None or workers < 2):
        raise ConfigError("--workload mixed runs two small models of its own, and needs 2 workers: no --model")
    if workload != "text":
        need_diffusers()
    plan = Plan(
        workload=workload,
        devices=devices,
        workers=workers,
        requests=requests if seconds is None else None,
        seconds=seconds,
        transport=_transport(broker, transport),
        broker=broker,
        model=model,
        reference=reference,
        head_layers=head_layers,
        tail_layers=tail_layers,
        chaos=parse_chaos(chaos, workers > 0, broker),
        seed=seed,
        keys=keys,
    )
    passive_threads()

    from split_device.stress.plot import check_plot, draw
    from split_device.stress.report import table
    from split_device.stress.run import run

    if plot is not None:
        check_plot(plot)
    with tempfile.TemporaryDirectory(prefix="lambda-split-stress-") as directory, contextlib.ExitStack() as stack:
        outcome = run(plan, Path(directory), stack)
    report = outcome.report
    if json:
        emit_json(report.facts())
    else:
        stdout().print(table(report))
    if plot is not None:
        draw(plot, outcome.ledger, outcome.chaos, report.seconds)
        stderr.print(f"drawn: {plot}", soft_wrap=True)
    if not report.sound or not report.completed:
        raise typer.Exit(1)
    if report.interrupted:
        raise KeyboardInterrupt


def _transport(broker: str | None, transport: TransportName) -> TransportName:
    """What a given address speaks."""
    if broker is None:
        return transport
    return "redis" if is_redis(broker) else "zmq"


def parse_chaos(text: str | None, has_workers: bool, broker: str | None) -> list[str]:
    """The kinds of faults that are asked for.

    Raises:
        ConfigError: an unknown one, or one that is not in this command's power.
    """
    impossible = {
        **({} if has_workers else dict.fromkeys(("kill", "stop"), "there is no worker of this command's own")),
        **({} if broker is None else {"broker": "the queue is not this command's own"}),
        **(
            {}
            if broker is None or broker.startswith(("tcp://", "zmq://", "redis://"))
            else dict.fromkeys(("lag", "drop", "corrupt"), f"no proxy can be put before {broker}")
        ),
    }
    if text is None:
        return [kind for kind in KINDS if kind not in impossible]
    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    for kind in kinds if kinds != ["none"] else []:
        if kind not in KINDS:
            raise ConfigError(f"--chaos {kind}: there are {', '.join(KINDS)}, and none")
        if kind in impossible:
            raise ConfigError(f"--chaos {kind}: {impossible[kind]}")
    return [] if kinds == ["none"] else list(dict.fromkeys(kinds))

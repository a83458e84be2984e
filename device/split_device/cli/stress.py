"""`lambda-split stress`: a fleet of processes under faults."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from split_common.cli.groups import Group, grouped
from split_common.cli.options import MODEL_PANEL, QUEUE_PANEL, JsonOption, KeysOption, LayersOption
from split_common.errors import ConfigError
from split_common.models.split import DEFAULT_LAYERS
from split_common.system.console import doing, emit_json, stderr, stdout
from split_common.system.files import user_path
from split_common.system.process import passive_threads
from split_common.transport.address import is_redis
from split_device.cli.groups import OldHeadOption, OldTailOption, chosen_layers
from split_device.images.settings import need_diffusers
from split_device.stress.hostile.modes import described, parse_modes
from split_device.stress.membership import check_own_fleet
from split_device.stress.plan import FAULTS, NETWORK_FAULTS, StressPlan, TransportName, Workload, WorkloadKind

_PLAN = Group(
    devices=Annotated[int, typer.Option(min=1, metavar="N", help="Number of device processes.")],
    requests=Annotated[int, typer.Option(min=1, metavar="N", help="Number of requests of each device.")],
    seconds=Annotated[
        float | None,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="Make requests for this long, instead of --requests; those in progress are then finished.",
        ),
    ],
    workload=Annotated[
        Workload,
        typer.Option(
            help="What devices generate; mixed alternates texts and images from device to device, and agents holds "
            "several conversations at once, sent whole at every turn."
        ),
    ],
    workers=Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Number of worker processes. 0 needs --broker, and uses the workers there."
        ),
    ],
    seed=Annotated[int, typer.Option(metavar="N", help="Determines requests, faults and the random model.")],
    model=Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=MODEL_PANEL,
            show_default="a small random model, which loads fast",
            help="Directory or hub id of a checkpoint; for images, the directory of a pipeline or a UNet.",
        ),
    ],
    reference=Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=MODEL_PANEL,
            help="Compare with this unsplit checkpoint, instead of that of --model.",
        ),
    ],
    transport=Annotated[
        TransportName, typer.Option(rich_help_panel=QUEUE_PANEL, help="Start a ZeroMQ broker or a Redis server.")
    ],
    broker=Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", rich_help_panel=QUEUE_PANEL, help="Use the queue at this address, and start none."
        ),
    ],
    keys=KeysOption,
)


@grouped
def stress(
    plan: Annotated[StressPlan, _PLAN],
    chaos: Annotated[
        str | None,
        typer.Option(
            metavar="KINDS",
            show_default="all that are possible, and none with --hostile",
            help="Faults, separated by commas: kill and stop (workers), broker (killed and restarted), lag, "
            "drop and corrupt (connections); or none.",
        ),
    ] = None,
    hostile: Annotated[
        str | None,
        typer.Option(
            metavar="MODES",
            help="Attack modes, separated by commas, or all.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw throughput over time, with the faults, e.g. to out.png."),
    ] = None,
    layers: LayersOption = None,
    head_layers: OldHeadOption = None,
    tail_layers: OldTailOption = None,
    json: JsonOption = False,
) -> None:
    """Run a fleet of processes under faults, and compare every output with the unsplit model's.

    Starts a queue, workers and devices on this machine. Workers are killed (SIGKILL) and stopped (SIGSTOP), and the
    queue's server is killed; all are restarted. Connections pass a proxy that delays, resets, truncates, swallows
    and corrupts. The times of the faults are drawn from the seed. The first Ctrl-C ends the requests, a second one
    ends everything.

    The report counts three kinds of errors. *Lost*: requests that failed or never ended. *Duplicated*: further
    outputs to one request, or outputs with more tokens than the unsplit model's. *Mismatched*: outputs that differ
    from the unsplit model's, texts in any token, images by more than 1e-5 of the largest latent.

    The exit code is 1 if any count is not 0, or if nothing was completed.

    With --hostile one member with a valid certificate does its worst, in one mode after another, beside honest
    devices and workers. Each mode has two slices of equal length: one beside the hostile member, and one beside a
    process that talks to nobody and burns as much CPU. --seconds is the time of all slices together; without it, a
    slice takes 10 seconds. The exit code is also 1 if a mode did nothing or ended early, if honest throughput in a
    mode's first slice is below half of that in its second, or if the memory of the broker, the Redis server or a
    worker grows by more than 1, 1.5 or 2 GiB, respectively.
    """
    plan = dataclasses.replace(plan, layers=chosen_layers(layers, head_layers, tail_layers))
    plan = _checked(plan, chaos, hostile)
    from split_device.stress.plot import check_plot, draw

    if plot is not None:
        check_plot(plot)
    passive_threads()
    with doing("loading torch"):
        from split_device.stress.report import table
        from split_device.stress.run import run

    with tempfile.TemporaryDirectory(prefix="lambda-split-stress-") as directory, contextlib.ExitStack() as stack:
        outcome = run(plan, Path(directory), stack)
    report = outcome.report
    if json:
        emit_json(report.facts())
    else:
        stdout().print(table(report))
    if plot is not None:
        draw(plot, outcome.ledger, outcome.chaos, report.seconds)
        stderr.print(f"wrote {plot}", soft_wrap=True)
    if not report.sound or not report.completed or not report.withstood:
        raise typer.Exit(1)
    if report.interrupted:
        raise KeyboardInterrupt


stress.__doc__ = f"{stress.__doc__}\n\n    Modes of --hostile:\n\n{textwrap.indent(described(), '    ')}\n"


def stress_device(
    model: Annotated[str, typer.Option()],
    broker: Annotated[str, typer.Option()],
    index: Annotated[int, typer.Option()],
    kind: Annotated[WorkloadKind, typer.Option()] = "text",
    seed: Annotated[int, typer.Option()] = 0,
    requests: Annotated[int | None, typer.Option()] = None,
    reference: Annotated[str | None, typer.Option()] = None,
    layers: LayersOption = None,
    keys: Annotated[Path | None, typer.Option()] = None,
    rejoin: Annotated[int | None, typer.Option()] = None,
    niceness: Annotated[int, typer.Option()] = 0,
    json: JsonOption = False,
) -> None:
    """A device of `lambda-split stress`, which starts it."""
    from split_device.stress.device import run_device

    run_device(
        model,
        broker,
        index,
        kind=kind,
        seed=seed,
        requests=requests,
        reference=reference,
        layers=layers or DEFAULT_LAYERS,
        keys=keys,
        rejoin=rejoin,
        niceness=niceness,
    )


def stress_hostile(
    mode: Annotated[str, typer.Option()],
    broker: Annotated[str, typer.Option()],
    keys: Annotated[Path, typer.Option()],
    root: Annotated[str, typer.Option()],
    first: Annotated[int, typer.Option()],
    last: Annotated[int, typer.Option()],
    model: Annotated[str, typer.Option()],
    width: Annotated[int, typer.Option()],
    seed: Annotated[int, typer.Option()] = 0,
    json: JsonOption = False,
) -> None:
    """A hostile member of `lambda-split stress`, which starts it."""
    from split_common.protocol.headers import Service
    from split_device.stress.hostile.process import run_hostile

    run_hostile(mode, broker, keys, Service(bytes.fromhex(root), first, last), model, width, seed)


def stress_bystander(cores: Annotated[float, typer.Option()], json: JsonOption = False) -> None:
    """A process of `lambda-split stress` that burns CPU as a hostile member did."""
    from split_device.stress.hostile.process import run_bystander

    run_bystander(cores)


def _checked(plan: StressPlan, chaos: str | None, hostile: str | None) -> StressPlan:
    """The plan, with the values that follow from others. Raises ConfigError if options contradict each other."""
    if plan.workers == 0 and plan.broker is None:
        raise ConfigError("--workers 0 needs --broker: a queue that is started here has no other workers")
    if plan.workers == 0 and plan.model is None:
        raise ConfigError("--workers 0 needs --model: running workers do not serve the small random model")
    if plan.keys is not None and plan.broker is None:
        raise ConfigError("--keys needs --broker: a fleet that is started here has its own keys")
    if plan.workload == "mixed" and (plan.model is not None or plan.workers < 2):
        raise ConfigError(
            "--workload mixed uses two small random models: give at least 2 --workers, and no --model"
        )
    if "image" in plan.kinds:
        need_diffusers()
    if hostile is not None:
        check_own_fleet(plan.broker)
        chaos = chaos or "none"
    return dataclasses.replace(
        plan,
        model=plan.model and str(user_path(plan.model)),
        reference=plan.reference and str(user_path(plan.reference)),
        requests=plan.requests if plan.seconds is None and hostile is None else None,
        transport=plan.transport if plan.broker is None else "redis" if is_redis(plan.broker) else "zmq",
        chaos=parse_chaos(chaos, plan.workers > 0, plan.broker),
        hostile=parse_modes(hostile, plan.transport, plan.kinds),
    )


def parse_chaos(text: str | None, has_workers: bool, broker: str | None) -> list[str]:
    """The kinds of faults that `--chaos` names; all that are possible if it is None.

    Raises:
        ConfigError: a kind is unknown, or this command cannot cause it.
    """
    impossible = {
        **({} if has_workers else dict.fromkeys(("kill", "stop"), "this command starts no worker")),
        **({} if broker is None else {"broker": "this command does not start the queue"}),
        **(
            {}
            if broker is None or broker.startswith(("tcp://", "zmq://", "redis://"))
            else dict.fromkeys(NETWORK_FAULTS, f"no proxy can be put before {broker}")
        ),
    }
    if text is None:
        return [kind for kind in FAULTS if kind not in impossible]
    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    for kind in kinds if kinds != ["none"] else []:
        if kind not in FAULTS:
            raise ConfigError(f"invalid --chaos {kind}: expected {', '.join(FAULTS)} or none")
        if kind in impossible:
            raise ConfigError(f"--chaos {kind}: {impossible[kind]}")
    return [] if kinds == ["none"] else list(dict.fromkeys(kinds))

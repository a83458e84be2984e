"""`lambda-split doctor`: checks that everything is in place, and says what to do if not."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from split_common.cli.groups import grouped
from split_common.cli.options import MODEL_PANEL, JsonOption, LayersOption
from split_common.errors import ConfigError, KeysError, NoWorker, SplitError
from split_common.protocol import headers
from split_common.system.console import doing, emit_json, stdout
from split_common.transport import connect, new_peer_id
from split_common.transport.address import masked
from split_common.trust.fleet import Fleet, load_fleet
from split_common.trust.keys import Identity, Role
from split_device.cli.doctor_draft import asked_draft_model, draft_findings
from split_device.cli.doctor_model import model_findings
from split_device.cli.finding import Finding
from split_device.cli.groups import CONNECTION
from split_device.cli.options import parse_speculate
from split_device.sessions.connection import Connection
from split_device.speculation.names import SPECULATE_METAVAR

if TYPE_CHECKING:
    from split_device.sessions.client import Client

#: A certificate that expires within this many days is reported.
EXPIRES_SOON = 14


@grouped
def doctor(
    connection: Annotated[
        Connection, CONNECTION.without("patience", "step_timeout", "history_memory", "pad_steps")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            envvar="LAMBDA_SPLIT_MODEL",
            rich_help_panel=MODEL_PANEL,
            help="Also check this checkpoint, a directory, GGUF file or hub id: whether and how it runs split, and "
            "what is refused; or how an image model is cut.",
        ),
    ] = None,
    layers: LayersOption = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            rich_help_panel=MODEL_PANEL,
            help="Also check whether this LoRA in PEFT's format runs with the model: its directory, and a name for "
            "it. May be repeated.",
        ),
    ] = None,
    speculate: Annotated[
        str | None,
        typer.Option(
            parser=parse_speculate,
            metavar=SPECULATE_METAVAR,
            rich_help_panel=MODEL_PANEL,
            help="Also check whether the small model of draft:MODEL, or mtp, can draft for the model.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check versions, hardware, keys, broker and workers, and say how to fix problems.

    The exit code is 1 if there is a problem.
    """
    if layers is not None and model is None:
        raise ConfigError("--layers is checked with a model: give --model as well")
    adapters, draft = _adapters(adapter or [], model), asked_draft_model(speculate, model)
    findings = []
    # Without --json, each finding is printed as it comes, the first one at once.
    with doing("checking this machine, the broker and the workers") if json else contextlib.nullcontext():
        for finding in itertools.chain(
            _findings(connection),
            model_findings(model, adapters, layers) if model is not None else (),
            draft_findings(draft, model) if draft is not None and model is not None else (),
        ):
            findings.append(finding)
            if not json:
                _print(finding)
    healthy = all(finding.status != "problem" for finding in findings)
    if json:
        emit_json({"healthy": healthy, "findings": [asdict(finding) for finding in findings]})
    if not healthy:
        raise typer.Exit(1)


def _adapters(given: list[str], model: str | None) -> dict[str, Path]:
    """The directories of adapters by their names. Raises ConfigError without a model, or if one is not a name."""
    if not given:
        return {}
    if model is None:
        raise ConfigError("--adapter is checked with a model: give --model as well")
    from split_common.models.adapters import parse_adapters

    return parse_adapters(given)


def _print(finding: Finding) -> None:
    mark, style = {"ok": ("✓", "green"), "note": ("•", "yellow"), "problem": ("✗", "red")}[finding.status]
    console = stdout()
    console.print(mark, style=style, end=" ")
    console.print(f"{finding.subject}: {finding.detail}", soft_wrap=True)


def _findings(connection: Connection) -> Iterator[Finding]:
    yield from _versions()
    yield from _hardware()
    try:
        fleet = load_fleet(Path(connection.keys) if connection.keys is not None else None)
        identity = _identity(fleet, connection.member)
    except SplitError as error:
        yield Finding("keys", "problem", str(error))
        return
    yield (certificate := _certificate(fleet, identity))
    if certificate.status == "problem":
        return
    if identity.certificate.role == "broker":
        detail = "not asked: this machine has only a broker's key, and brokers answer devices and workers"
        yield Finding("broker", "note", detail)
    else:
        yield from _queue(connection.broker, fleet, identity, connection.timeout)


def _versions() -> Iterator[Finding]:
    wanted = ("lambda-split", "torch", "transformers", "pyzmq", "redis", "pynacl", "msgspec")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in wanted)
    yield Finding("versions", "ok", f"Python {platform.python_version()}, {versions}")


def _hardware() -> Iterator[Finding]:
    import torch

    from split_common.protocol.channel import preferred_suites

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        places = ", ".join(f"cuda:{index} {name}" for index, name in enumerate(names))
        yield Finding(
            "GPU", "ok", names[0] if len(names) == 1 else f"{places} (a worker's --device may name several)"
        )
    elif torch.version.cuda is None:
        yield Finding("GPU", "note", "torch is built for the CPU; a worker on a GPU needs a CUDA build of torch")
    else:
        yield Finding("GPU", "note", "torch finds none; if there is one, check that `nvidia-smi` lists it")
    threads, cores = torch.get_num_threads(), _cores()
    detail = f"torch uses {threads} on {cores} {'core' if cores == 1 else 'cores'}"
    if threads > cores:
        yield Finding("threads", "problem", f"{detail}: set OMP_NUM_THREADS={cores}, or they slow each other down")
    else:
        yield Finding("threads", "ok", detail)
    yield _compiled_code()
    suite = preferred_suites()[0]
    hint = "" if suite.startswith("aegis") else ": the CPU has no AES instructions, encryption is slower"
    yield Finding("encryption", "ok" if not hint else "note", suite + hint)


def _compiled_code() -> Finding:
    """Whether layers on the CPU can be fused, and by which instructions."""
    from split_common.engine import native
    from split_common.engine.tuning import from_environment

    if not from_environment():
        return Finding("CPU", "note", "LAMBDA_SPLIT_TUNE is off: nothing is compiled for this CPU")
    if native.load():
        detail = f"layers of the usual shape are fused, by code for its {native.instruction_set()}"
        return Finding("CPU", "ok", detail)
    if (command := native.compiler()) is not None:
        detail = f"layers of the usual shape will be fused: {command} compiles the code at a first start"
        return Finding("CPU", "ok", detail)
    wanted = "with a C++ compiler (c++, g++, clang++ or CXX), a step of one session may take a quarter of the time"
    return Finding("CPU", "note", f"layers are not fused: {wanted}")


def _cores() -> int:
    """CPU cores that this process may use: a container's share, where it has one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def _identity(fleet: Fleet, member: str | None) -> Identity:
    """This machine's identity: a device's if its key is here, else a worker's or a broker's."""
    if member is not None:
        return fleet.read_identity(member)
    others: tuple[Role, ...] = ("worker", "broker")
    try:
        return fleet.identity("device")
    except KeysError:
        for role in others:
            with contextlib.suppress(KeysError):
                return fleet.identity(role)
        raise


def _certificate(fleet: Fleet, identity: Identity) -> Finding:
    certificate = identity.certificate
    whose = "made for this machine's loopback" if fleet.is_loopback else f"from {fleet.path}"
    about = f"{whose}; the certificate of {certificate.role} {certificate.name!r}"
    listed = fleet.roster().by_name(certificate.name)
    days = (certificate.not_after - time.time()) / 86400
    ask = "ask the operator for new keys (`lambda-split keys add-device` or `add-worker`)"
    if listed is None:
        return Finding("keys", "problem", f"{about} is not in the roster here: copy the operator's newest roster")
    if listed.revoked:
        return Finding("keys", "problem", f"{about} is revoked: {ask}")
    if days <= 0:
        return Finding("keys", "problem", f"{about} has expired: {ask}")
    if days < EXPIRES_SOON and not fleet.is_loopback:
        return Finding("keys", "note", f"{about} is valid for {days:.0f} more days: {ask}")
    return Finding("keys", "ok", f"{about} is valid for {days:.0f} more days")


def _queue(broker: str, fleet: Fleet, identity: Identity, timeout: float) -> Iterator[Finding]:
    from split_device.sessions.client import Client

    no_service = headers.Service(bytes(32), 0, 1)
    try:
        transport = connect(broker, fleet, identity)
        if identity.certificate.role == "device":
            client = Client(
                transport, fleet, identity, no_service, "nothing", "float32", timeout=timeout, patience=0
            )
            client.start()
        else:
            client = None
            transport.start(_Probe(identity), timeout)
    except SplitError as error:
        yield Finding("broker", "problem", str(error))
        return
    try:
        yield Finding("broker", "ok", f"answers at {masked(broker)}")
        if client is not None:
            yield _workers(client)
        else:
            yield Finding("workers", "note", "not asked: only devices may ask, and there is no device's key here")
    finally:
        transport.close()


def _workers(client: Client) -> Finding:
    """What is served: the broker's answer to a request for a model that no worker serves."""
    try:
        client.open_session()
    except NoWorker as answer:
        if answer.served and answer.served != "none":
            return Finding("workers", "ok", f"serving {answer.served}")
        return Finding("workers", "problem", "none: start one with `lambda-split worker`")
    except SplitError as error:
        return Finding("workers", "problem", str(error))
    return Finding("workers", "problem", "a worker answered for a model that does not exist")


class _Probe:
    """A transport's `Handler` for a worker that serves nothing: it only finds out whether the broker answers."""

    def __init__(self, identity: Identity) -> None:
        name = identity.certificate.name
        self._announce = headers.Announce(new_peer_id(name), "worker", name)

    def announcement(self) -> headers.Announce:
        return self._announce

    def on_message(self, header: headers.AnyHeader, body: bytes) -> None:
        pass

    def on_gone(self, peers: Iterable[bytes]) -> None:
        pass

    def on_reset(self) -> None:
        pass

    def on_roster(self) -> None:
        pass

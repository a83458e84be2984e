"""`lambda-split doctor`: is everything in place, and what to do where it is not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import typer

from split_common.console import emit_json, stderr
from split_common.errors import NoWorker, SplitError
from split_common.options import DEFAULT_BROKER, BrokerOption, JsonOption, KeysOption, MemberOption, TimeoutOption

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    status: Status
    detail: str


def doctor(
    broker: BrokerOption = DEFAULT_BROKER,
    keys: KeysOption = None,
    member: MemberOption = None,
    timeout: TimeoutOption = 3.0,
    json: JsonOption = False,
) -> None:
    """Check versions, hardware, keys, broker and workers; say what to do. Exit code 1 if anything is a problem."""
    findings = [*_versions(), *_hardware(), *_fleet(broker, keys, member, timeout)]
    healthy = all(finding.status != "problem" for finding in findings)
    if json:
        emit_json({"healthy": healthy, "findings": [asdict(finding) for finding in findings]})
    else:
        marks = {"ok": "[green]✓[/]", "note": "[yellow]•[/]", "problem": "[red]✗[/]"}
        for finding in findings:
            stderr.print(f"{marks[finding.status]} {finding.subject}: {finding.detail}", markup=True)
    if not healthy:
        raise typer.Exit(1)


def _versions() -> Iterator[Finding]:
    wanted = ("lambda-split", "torch", "transformers", "pyzmq", "pynacl", "msgspec")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in wanted)
    yield Finding("versions", "ok", f"Python {platform.python_version()}, {versions}")


def _hardware() -> Iterator[Finding]:
    import torch

    from split_common.channel import preferred_suites

    if torch.cuda.is_available():
        yield Finding("GPU", "ok", torch.cuda.get_device_name())
    else:
        yield Finding("GPU", "note", "none that torch sees: workers here compute on the CPU")
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    policy = os.environ.get("OMP_WAIT_POLICY", "not set (the commands set PASSIVE)")
    yield Finding("threads", "ok" if threads <= cores else "problem", _threads(threads, cores, policy))
    suite = preferred_suites()[0]
    hint = "" if suite.startswith("aegis") else ": the CPU has no AES instructions, encryption is slower"
    yield Finding("encryption", "ok" if not hint else "note", suite + hint)


def _threads(threads: int, cores: int, policy: str) -> str:
    advice = "" if threads <= cores else "; set OMP_NUM_THREADS to the number of cores"
    return f"torch uses {threads} on {cores} cores, OMP_WAIT_POLICY {policy}{advice}"


def _fleet(broker: str, keys: KeysOption, member: MemberOption, timeout: float) -> Iterator[Finding]:
    from split_common.fleet import load_fleet
    from split_common.transport import connect

    try:
        fleet = load_fleet(keys)
        identity = fleet.identity("device", member)
        transport = connect(broker, fleet, identity)
    except SplitError as error:
        yield Finding("keys", "problem", str(error))
        return
    certificate = identity.certificate
    days = (certificate.not_after - time.time()) / 86400
    whose = "made for this machine's loopback" if fleet.is_loopback else f"from {fleet.path}"
    if days <= 0:
        yield Finding("keys", "problem", f"the certificate of {certificate.name} has expired: ask for a new one")
    else:
        detail = f"{whose}; {certificate.name}'s certificate is valid for {days:.0f} more days"
        yield Finding("keys", "ok" if days > 14 or fleet.is_loopback else "note", detail)

    from split_common import wire
    from split_device.client import Client

    nothing = wire.Service(bytes(32), 0, 1)
    client = Client(transport, fleet, identity, nothing, "nothing", "float32", timeout=timeout, patience=0)
    try:
        client.start()
    except SplitError as error:
        yield Finding("broker", "problem", str(error))
        return
    try:
        yield Finding("broker", "ok", f"answers at {broker}")
        yield _workers(client)
    finally:
        client.close()


def _workers(client: object) -> Finding:
    """What is served: the broker says it when it is asked for something that nobody serves."""
    from split_device.client import Client

    assert isinstance(client, Client)
    try:
        client.open_session()
    except NoWorker as answer:
        served = answer.served
        if served:
            return Finding("workers", "ok", f"serving {served}")
        return Finding("workers", "problem", "none: start one with `lambda-split worker`")
    except SplitError as error:
        return Finding("workers", "problem", str(error))
    return Finding("workers", "problem", "a worker answered for a model that does not exist")

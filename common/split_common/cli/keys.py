"""`lambda-split keys …`: the operator of a fleet manages its keys."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from split_common.cli.options import (
    AdaptersOption,
    BrokerOption,
    FleetOption,
    IpAdapterOption,
    JsonOption,
    KeysOption,
    ModelArgument,
    RevisionOption,
)
from split_common.cli.redis_acl import redis_acl
from split_common.errors import ConfigError, KeysError
from split_common.models.adapters import parse_adapters, read_adapter
from split_common.models.checkpoint import Checkpoint
from split_common.models.demo_model import resolve_model
from split_common.models.verification import build_manifest
from split_common.system.console import doing, emit_json, stderr
from split_common.system.times import iso_time
from split_common.transport import check_address
from split_common.transport.address import DEFAULT_BROKER, is_redis, masked, parse_address
from split_common.trust.fleet import DAYS, Fleet, keys_dir, load_fleet
from split_common.trust.keys import Certificate, Member, ModelScope, Role
from split_common.trust.manifest import Manifest
from split_common.trust.passphrase import ask_passphrase

keys_app = typer.Typer(no_args_is_help=True)

DaysOption = Annotated[
    int, typer.Option(min=1, max=36_500, metavar="N", help="Number of days for which the certificates are valid.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands for the operator of a fleet to `app`."""
    app.add_typer(keys_app, name="keys", help="Make and manage a fleet's keys, members and models.")
    app.command()(redis_acl)


@keys_app.command()
def init(
    keys: FleetOption = None,
    days: DaysOption = DAYS,
    passphrase: Annotated[
        bool,
        typer.Option(
            "--passphrase",
            help="Seal operator.key under a passphrase, which is asked for, or is in $LAMBDA_SPLIT_PASSPHRASE.",
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Make a new fleet: the operator's key, a broker, a device and a worker.

    Give each machine its own NAME.key with operator.pub, roster and models/. Keep operator.key to yourself.
    """
    path = keys_dir(keys)
    fleet = Fleet.create(path, days, ask_passphrase(path / "operator.key", again=True) if passphrase else None)
    names = ", ".join(member.name for member in fleet.roster().members)
    _report(json, f"made a fleet in {fleet.path}: {names}", _summary(fleet))


@keys_app.command()
def add_device(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new device's name: a-z, 0-9, '.', '_' and '-'.")],
    keys: FleetOption = None,
    days: DaysOption = DAYS,
    json: JsonOption = False,
) -> None:
    """Add a device: its keys in NAME.key, and a new roster."""
    _add_member("device", name, keys, (), days, json)


@keys_app.command()
def add_worker(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new worker's name: a-z, 0-9, '.', '_' and '-'.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Allow the worker to serve only this model of the fleet. Needs --layers."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:LAST",
            help="Layers of --model that the worker may serve, e.g. 2:28; blocks of an image model.",
        ),
    ] = None,
    keys: FleetOption = None,
    days: DaysOption = DAYS,
    json: JsonOption = False,
) -> None:
    """Add a worker: its keys in NAME.key, and a new roster. Without --model, it may serve every model."""
    if (model is None) != (layers is None):
        raise ConfigError("--model and --layers go together")
    models: tuple[ModelScope, ...] = ()
    if model is not None and layers is not None:
        first, last = _layer_range(layers)
        models = (ModelScope(_manifest(_open(keys), model).root, first, last),)
    _add_member("worker", name, keys, models, days, json)


@keys_app.command()
def add_model(
    model: ModelArgument = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default="the checkpoint's", help="The model's name in the fleet."),
    ] = None,
    revision: RevisionOption = None,
    ip_adapter: IpAdapterOption = None,
    adapter: AdaptersOption = None,
    keys: FleetOption = None,
    json: JsonOption = False,
) -> None:
    """Sign a list of a model's tensors, and one of each adapter's, so that each side can check what it loads."""
    fleet = _open(keys)
    fleet.require_operator()
    checkpoint = Checkpoint.resolve(resolve_model(model), revision, ip_adapter)
    directories = parse_adapters(adapter or ())
    manifest = _hash(checkpoint, name)
    loras = [read_adapter(name, directory, manifest).checkpoint for name, directory in directories.items()]
    adapters = [_hash(lora, None) for lora in loras]
    for each in (manifest, *adapters):
        fleet.add_manifest(each)
    message = f"added model {manifest.name} ({len(manifest.tensors)} tensors) to {fleet.path}"
    for each in adapters:
        message += f"\nadded adapter {each.name} ({len(each.tensors)} tensors)"
    summary = {"keys": str(fleet.path), "model": _model(manifest)}
    _report(json, message, summary | ({"adapters": [_model(each) for each in adapters]} if adapters else {}))


@keys_app.command()
def show(keys: KeysOption = None, json: JsonOption = False) -> None:
    """List the fleet's members and models. Expiry is shown for members whose NAME.key is in the directory."""
    fleet = load_fleet(keys)
    if json:
        emit_json(_summary(fleet))
        return
    console = Console()
    kind = ", for this machine only" if fleet.is_loopback else ""
    console.print(f"{fleet.path} (roster version {fleet.roster().version}{kind})", highlight=False)
    members = Table("name", "role", "valid until", "revoked", "fingerprint")
    for member in fleet.roster().members:
        certificate = _certificate(fleet, member)
        until = "" if certificate is None else f"{datetime.fromtimestamp(certificate.not_after, UTC):%Y-%m-%d}"
        revoked = "revoked" if member.revoked else ""
        members.add_row(member.name, member.role, until, revoked, member.fingerprint)
    console.print(members)
    models = Table("model", "tensors", "root")
    for manifest in fleet.manifests():
        models.add_row(manifest.name, str(len(manifest.tensors)), manifest.root.hex())
    console.print(models)


@keys_app.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The member to revoke. This cannot be undone.")],
    keys: FleetOption = None,
    json: JsonOption = False,
) -> None:
    """Revoke a member.

    A broker that reads this directory tells all others within seconds. Over Redis, run `keys publish`.
    """
    fleet = _open(keys)
    roster = fleet.revoke(name)
    message = f"revoked {name}; the roster has version {roster.version}"
    _report(json, message, {"keys": str(fleet.path), "revoked": name, "roster_version": roster.version})


@keys_app.command()
def publish(broker: BrokerOption = DEFAULT_BROKER, keys: KeysOption = None, json: JsonOption = False) -> None:
    """Store the roster in Redis; all members apply it within seconds. A ZeroMQ broker reads its own directory."""
    from split_common.transport.redis.roster import publish as publish_roster

    address, fleet = _redis(broker, keys)
    own = fleet.roster().version
    there = publish_roster(address, fleet)
    message = f"{masked(address)} has the roster of version {there}"
    if there > own:
        message += f", which is newer than version {own} and has replaced it in this directory"
    _report(json, message, {"broker": masked(address), "keys": str(fleet.path), "roster_version": there})


@keys_app.command()
def sweep(
    broker: BrokerOption = DEFAULT_BROKER,
    keys: KeysOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    json: JsonOption = False,
) -> None:
    """Publish the roster, and remove from Redis what revoked members and older versions left there.

    Also removes lanes that would never expire, and says how much each member has stored.
    """
    from split_common.transport.redis.sweep import sweep as sweep_server

    address, fleet = _redis(broker, keys)
    swept = sweep_server(address, fleet, dry_run)
    if json:
        emit_json(
            {
                "broker": masked(address),
                "removed": {name: {"keys": swept.keys[name], "bytes": swept.bytes[name]} for name in swept.keys},
                "left": dict(swept.left),
            }
        )
        return
    verb = "would remove" if dry_run else "removed"
    for name, count in swept.keys.items():
        print(f"{verb} {count} keys of {name or 'nobody'}, {swept.bytes[name]:,} bytes")
    for name, size in swept.left.most_common():
        print(f"{name or 'the fleet'} has {size:,} bytes")


def _redis(broker: str, keys: Path | None) -> tuple[str, Fleet]:
    """The address of a Redis server, and the fleet.

    Raises:
        ConfigError: the address is another one, or open to other machines though no keys are configured.
    """
    address = parse_address(broker)
    if not is_redis(address):
        raise ConfigError(
            f"{masked(address)} is not the address of a Redis server: give it with --broker; a ZeroMQ broker reads "
            "the roster in its own directory"
        )
    fleet = load_fleet(keys)
    check_address(address, fleet)
    return address, fleet


def _open(keys: Path | None) -> Fleet:
    """The configured fleet, never the loopback one."""
    return Fleet.open(keys_dir(keys))


def _add_member(
    role: Role, name: str, keys: Path | None, models: tuple[ModelScope, ...], days: int, json: bool
) -> None:
    fleet = _open(keys)
    fleet.add_member(role, name, models, days)
    member = fleet.roster().by_name(name)
    assert member is not None
    version = fleet.roster().version
    summary = {"keys": str(fleet.path), "member": _member(fleet, member), "roster_version": version}
    _report(json, f"added {role} {name}: {fleet.path / f'{name}.key'}", summary)


def _hash(checkpoint: Checkpoint, name: str | None) -> Manifest:
    if not stderr.is_terminal:
        # A bar would be shown at its end alone.
        with doing(f"hashing {checkpoint.name}"):
            return build_manifest(checkpoint, name)
    columns = (TextColumn("hashing {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr) as progress:
        task = progress.add_task(checkpoint.name, total=checkpoint.nbytes(checkpoint.tensor_names))
        return build_manifest(checkpoint, name, lambda count: progress.advance(task, count))


def _layer_range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text, re.ASCII)
    first, last = map(int, match.groups()) if match else (0, 0)
    if first >= last:
        raise ConfigError(f"invalid --layers {text!r}: expected FIRST:LAST with 0 <= FIRST < LAST")
    return first, last


def _manifest(fleet: Fleet, name: str) -> Manifest:
    manifests = {manifest.name: manifest for manifest in fleet.manifests()}
    if name not in manifests:
        known = ", ".join(manifests) or "none"
        raise KeysError(f"the fleet has no model {name!r} (it has: {known}); run `lambda-split keys add-model`")
    return manifests[name]


def _certificate(fleet: Fleet, member: Member) -> Certificate | None:
    """The member's certificate if its key file is in the directory."""
    if not (fleet.path / f"{member.name}.key").exists():
        return None
    return fleet.read_identity(member.name).certificate


def _summary(fleet: Fleet) -> dict[str, Any]:
    return {
        "keys": str(fleet.path),
        "loopback": fleet.is_loopback,
        "roster_version": fleet.roster().version,
        "members": [_member(fleet, member) for member in fleet.roster().members],
        "models": [_model(manifest) for manifest in fleet.manifests()],
    }


def _member(fleet: Fleet, member: Member) -> dict[str, Any]:
    certificate = _certificate(fleet, member)
    return {
        "name": member.name,
        "role": member.role,
        "fingerprint": member.fingerprint,
        "revoked": member.revoked,
        "not_before": certificate and certificate.not_before,
        "not_after": certificate and certificate.not_after,
        "valid_from": iso_time(certificate.not_before) if certificate else None,
        "valid_until": iso_time(certificate.not_after) if certificate else None,
        "models": [
            {"root": scope.root.hex(), "layers": f"{scope.first}:{scope.last}"}
            for scope in (certificate.models if certificate else ())
        ],
    }


def _model(manifest: Manifest) -> dict[str, Any]:
    return {"name": manifest.name, "root": manifest.root.hex(), "tensors": len(manifest.tensors)}


def _report(as_json: bool, message: str, result: dict[str, Any]) -> None:
    stderr.print(message, soft_wrap=True, markup=False)
    if as_json:
        emit_json(result)

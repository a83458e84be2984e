"""The `lambda-split worker` command."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import typer

from split_common.address import DEFAULT_BROKER
from split_common.cli.options import (
    MODEL_PANEL,
    BrokerOption,
    DtypeOption,
    IpAdapterOption,
    JsonOption,
    KeysOption,
    MemberOption,
    ModelOption,
    RevisionOption,
    TimeoutOption,
    parse_size,
)
from split_common.console import emit_json, stderr
from split_common.demo_model import resolve_model
from split_common.errors import ConfigError
from split_common.fleet import load_fleet
from split_common.process import catch_sigterm, passive_threads, wait_for
from split_common.transport import connect

DeviceName = Literal["auto", "cpu", "cuda"]
CutName = Literal["A", "C"]

#: Tokens of the sessions in which a worker's memory is told to people.
SESSION_TOKENS = 2048

#: Seconds of draining that are not worth a word.
UNANNOUNCED = 0.2


def register(app: typer.Typer) -> None:
    """Adds the `worker` command to `app`."""
    app.command()(worker)


def worker(
    model: ModelOption = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:LAST",
            rich_help_panel=MODEL_PANEL,
            help="The body's layers, as a slice. Default: 2:-2, which leaves two at each end.",
        ),
    ] = None,
    cut: Annotated[
        CutName | None,
        typer.Option(
            rich_help_panel=MODEL_PANEL,
            help="Of a diffusion model, instead of --layers: C leaves the device a UNet's first level, or a "
            "transformer's first and last block; A two levels, or a sixth of the blocks at each end. Default: C.",
        ),
    ] = None,
    ip_adapter: IpAdapterOption = None,
    broker: BrokerOption = DEFAULT_BROKER,
    device: Annotated[
        DeviceName, typer.Option(help="Where the body runs; auto takes a GPU if there is one.")
    ] = "auto",
    dtype: DtypeOption = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="CPU threads. Default: one for each core.")
    ] = None,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="For keys and values, like 4GiB; default: a share of what is free. Of a diffusion model, for "
            "embeddings; default: 1GiB.",
        ),
    ] = None,
    max_sessions: Annotated[int, typer.Option(min=1, metavar="N", help="Sessions held at once.")] = 1024,
    idle_timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Before an idle session is freed.")
    ] = 900.0,
    drain_timeout: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="That sessions have to end after SIGTERM.")
    ] = 30.0,
    revision: RevisionOption = None,
    keys: KeysOption = None,
    member: MemberOption = None,
    timeout: TimeoutOption = 10.0,
    json: JsonOption = False,
) -> None:
    """Serve a model's body to devices, until SIGTERM (which lets sessions end) or Ctrl-C.

    Needs a running `lambda-split broker`, or a Redis or Valkey server.
    """
    passive_threads()
    kv_bytes = parse_size(kv_memory) if kv_memory is not None else None
    fleet = load_fleet(keys)
    identity = fleet.identity("worker", member)
    transport = connect(broker, fleet, identity)
    checkpoint = resolve_model(model)

    import torch

    from split_common.tensors import parse_dtype
    from split_worker.body import Body
    from split_worker.serving import load_body
    from split_worker.sessions import SessionTable
    from split_worker.worker import Worker

    if threads is not None:
        torch.set_num_threads(threads)
    place = _device(device)
    serving = load_body(
        checkpoint,
        fleet,
        revision=revision,
        layers=layers,
        cut=cut,
        ip_adapter=ip_adapter,
        device=torch.device(place),
        dtype=parse_dtype(dtype),
        memory=kv_bytes,
    )
    body, service = serving.body, serving.service
    sessions = SessionTable(max_sessions, idle_timeout)
    stop = catch_sigterm()
    running = Worker(body, service, serving.model, identity, fleet, transport, sessions, stop.set)
    running.start(timeout)
    try:
        facts: dict[str, Any] = {
            "worker": identity.certificate.name,
            "id": running.id.hex(),
            "model": serving.model,
            "layers": f"{service.first}:{service.last}",
            "device": place,
            "dtype": str(body.dtype).removeprefix("torch."),
            "parameter_bytes": body.parameter_bytes,
            "pid": os.getpid(),
        }
        if isinstance(body, Body):
            facts |= {
                "kv_tokens": body.store.capacity,
                "kv_sessions": body.store.capacity // min(SESSION_TOKENS, body.max_positions),
                "packed": body.separate_because is None,
                "attention": body.backend.name if body.separate_because is None else None,
                "compiled": body.compiled,
            }
        if json:
            emit_json(facts)
        elif not isinstance(body, Body):
            stderr.print(
                "worker {worker} serves {model} blocks {layers} on {device} in {dtype} "
                "({parameter_bytes:,} bytes of weights)".format(**facts),
                soft_wrap=True,
            )
        else:
            stderr.print(
                "worker {worker} serves {model} layers {layers} on {device} in {dtype} "
                "({parameter_bytes:,} bytes of weights; keys and values for {kv_tokens:,} tokens, "
                "or {kv_sessions:,} sessions of {each:,})".format(
                    **facts, each=min(SESSION_TOKENS, body.max_positions)
                ),
                soft_wrap=True,
            )
            if body.separate_because is not None:
                stderr.print(f"sessions run one at a time: {body.separate_because}", soft_wrap=True)
        wait_for(stop)
        running.check()
        if not running.drain(min(drain_timeout, UNANNOUNCED)):
            stderr.print(f"draining: no new sessions; those that are open have {drain_timeout:g} s to end")
            if not running.drain(drain_timeout):
                stderr.print(f"sessions were still open after {drain_timeout:g} s")
    finally:
        running.stop()


def _device(name: DeviceName) -> str:
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("torch sees no CUDA device: use --device cpu, or install a CUDA build of torch")
    return "cuda" if available and name != "cpu" else "cpu"

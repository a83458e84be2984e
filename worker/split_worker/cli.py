"""The `lambda-split worker` command."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from split_common.cli.options import (
    AdaptersOption,
    BrokerOption,
    CutOption,
    DevicesOption,
    DtypeOption,
    IpAdapterOption,
    JsonOption,
    KeysOption,
    LayersOption,
    MemberOption,
    ModelOption,
    RevisionOption,
    ThreadsOption,
    TimeoutOption,
    TuneOption,
    given,
    parse_cache_size,
    parse_size,
)
from split_common.errors import ConfigError
from split_common.models.checkpoint_files import model_name
from split_common.models.demo_model import resolve_model
from split_common.models.denoisers.sizes import MAX_PIXELS
from split_common.system.console import doing, emit_json, saying_stop, stderr
from split_common.system.process import passive_threads
from split_common.system.signals import catch_sigterm, wait_until_set
from split_common.transport import connect
from split_common.transport.address import DEFAULT_BROKER, masked
from split_common.trust.fleet import load_fleet

if TYPE_CHECKING:
    from split_worker.bodies.base import AnyBody
    from split_worker.bodies.loading import Serving
    from split_worker.worker import Worker

#: Seconds of draining after which a message says what is waited for.
SILENT_DRAIN = 0.2


def register(app: typer.Typer) -> None:
    """Adds the `worker` command to `app`."""
    app.command()(worker)


def worker(
    context: typer.Context,
    model: ModelOption = None,
    image_model: Annotated[str | None, typer.Option("--image-model", metavar="DIR", hidden=True)] = None,
    layers: LayersOption = None,
    cut: CutOption = None,
    ip_adapter: IpAdapterOption = None,
    adapter: AdaptersOption = None,
    broker: BrokerOption = DEFAULT_BROKER,
    device: DevicesOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    tune: TuneOption = "on",
    kv_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            show_default="a share of the free memory; for image models, 1GiB",
            help="Memory for the keys and values of a language model, or the embeddings of an image model.",
        ),
    ] = None,
    prefix_cache: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            show_default="all that open sessions leave of --kv-memory",
            help="Memory for ended sessions of language models, so that later ones that begin with the same tokens "
            "send only what is new. Open sessions come first. 0 or off turns it off.",
        ),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            envvar=MAX_PIXELS,
            show_default="four times as many as the model was made for, and at least 1048576",
            help="Image models: maximum number of pixels of an image. Devices that ask for more than the default "
            f"need {MAX_PIXELS} set to the same value.",
        ),
    ] = None,
    max_sessions: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of sessions that are open at once.")
    ] = 1024,
    idle_timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="How long a session may be idle before it is closed.")
    ] = 900.0,
    drain_timeout: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long to wait for open sessions after SIGTERM.")
    ] = 30.0,
    revision: RevisionOption = None,
    keys: KeysOption = None,
    member: MemberOption = None,
    timeout: TimeoutOption = 10.0,
    json: JsonOption = False,
) -> None:
    """Serve a model's body to devices until SIGTERM, which lets open sessions end, or Ctrl-C.

    Needs a running `lambda-split broker`, or a Redis or Valkey server.
    """
    passive_threads()
    kv_bytes = parse_size(kv_memory) if kv_memory is not None else None
    kept_bytes = parse_cache_size(prefix_cache) if prefix_cache is not None else None
    fleet = load_fleet(keys)
    identity = fleet.identity("worker", member)
    transport = connect(broker, fleet, identity)
    # A worker has one model, whatever its kind; devices, which may have two, call it by this name.
    if image_model is not None and given(context, ["--model"]):
        raise ConfigError(
            "a worker serves one model: give either --model or --image-model, and start another worker for the "
            "other one"
        )
    checkpoint = resolve_model(model if image_model is None else image_model)
    with doing(f"loading {model_name(checkpoint)}, connecting to {masked(broker)}"):
        import torch

        from split_common.models.tensors import parse_devices, parse_dtype
        from split_worker.bodies.loading import load_body
        from split_worker.limits import WorkerLimits
        from split_worker.worker import Worker

        if threads is not None:
            torch.set_num_threads(threads)
        serving = load_body(
            checkpoint,
            fleet,
            revision=revision,
            layers=None if layers is None else str(layers),
            cut=cut,
            ip_adapter=ip_adapter,
            adapters=adapter or (),
            device=parse_devices(device),
            dtype=parse_dtype(dtype),
            memory=kv_bytes,
            max_pixels=max_pixels,
            tune=tune == "on",
            images=image_model is not None,
        )
        limits = WorkerLimits(max_sessions, idle_timeout, kept_tokens=_kept_tokens(serving.body, kept_bytes))
        stop = catch_sigterm()
        running = Worker(serving.body, serving.service, serving.model, identity, fleet, transport, limits, stop.set)
        running.start(timeout)
    try:
        with saying_stop(f"{running.name} takes no new sessions"):
            _announce(running, serving, identity.certificate.name, json)
            wait_until_set(stop)
            running.check()
        _drain(running, drain_timeout)
    finally:
        running.stop()


def _kept_tokens(body: AnyBody, kept_bytes: int | None) -> int | None:
    """The tokens of keys and values that so many bytes hold."""
    if kept_bytes is None or body.store is None:
        return None
    return kept_bytes // body.store.token_bytes


def _announce(running: Worker, serving: Serving, name: str, json: bool) -> None:
    """Prints what is served: text on stderr, or JSON on stdout."""
    body, layers = serving.body, f"{serving.service.first}:{serving.service.last}"
    if not json:
        first, *more = body.describe(layers)
        for line in (f"worker {running.name} serves {serving.model} {first}", *more):
            stderr.print(line, soft_wrap=True)
        return
    facts = {
        "worker": name,
        "name": running.name,
        "id": running.id.hex(),
        "model": serving.model,
        "layers": layers,
        "device": body.device.type,
        "dtype": str(body.dtype).removeprefix("torch."),
        "parameter_bytes": body.parameter_bytes,
        "pid": os.getpid(),
    }
    emit_json(facts | body.facts())


def _drain(running: Worker, timeout: float) -> None:
    """Waits for open sessions to end, for at most `timeout` seconds."""
    if running.drain(min(timeout, SILENT_DRAIN)):
        return
    stderr.print(f"draining: sessions that are open have {timeout:g} s to end")
    if not running.drain(timeout):
        stderr.print(f"sessions were still open after {timeout:g} s")

"""A queue and workers, over real sockets: what most tests of the whole path run against."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from split_broker.broker import Broker
from split_common.errors import NoWorker, SessionLost
from split_common.transport import connect
from split_common.trust.fleet import Fleet, load_fleet
from split_device import SplitModelForCausalLM
from split_worker.bodies.loading import load_body
from split_worker.limits import WorkerLimits
from split_worker.worker import Worker
from valkeys import Valkey, running_valkey

#: What `running_broker` starts; tests that use the fixture `transport` run with each.
TRANSPORTS = ("zmq", "redis")
transport = "zmq"

#: For tests of numbers and of refusals, which do not depend on the transport: Redis is left to `make test-long`, or
#: to `make test-nightly`.
TRANSPORTS_IN_TURN = ("zmq", pytest.param("redis", marks=pytest.mark.long))
TRANSPORTS_AT_NIGHT = ("zmq", pytest.param("redis", marks=pytest.mark.nightly))

#: Memory for keys and values of a worker.
KV_BYTES = 64 * 1024**2


def start_worker(
    checkpoint: Path,
    broker: str,
    layers: str | None = None,
    fleet: Fleet | None = None,
    limits: WorkerLimits | None = None,
    dtype: torch.dtype | None = None,
    cut: str | None = None,
    ip_adapter: Path | None = None,
    adapters: Sequence[str] = (),
    devices: Sequence[torch.device] = (torch.device("cpu"),),
) -> Worker:
    """A worker of a checkpoint's body, joined to a broker; the caller stops it."""
    fleet = fleet or load_fleet()
    serving = load_body(
        str(checkpoint),
        fleet,
        layers=layers,
        cut=cut,
        ip_adapter=ip_adapter,
        adapters=adapters,
        device=devices,
        dtype=dtype,
        memory=KV_BYTES,
    )
    identity = fleet.identity("worker")
    transport = connect(broker, fleet, identity)
    worker = Worker(serving.body, serving.service, serving.model, identity, fleet, transport, limits)
    worker.start()
    return worker


@contextlib.contextmanager
def using(name: str) -> Iterator[str]:
    """Makes `running_broker` start a transport's queue."""
    global transport
    transport = name
    yield name
    transport = "zmq"


@contextlib.contextmanager
def running_broker() -> Iterator[Broker | Valkey]:
    """A broker in this process, or a Valkey server. Raises ValueError for another transport than `TRANSPORTS`."""
    if transport not in TRANSPORTS:
        raise ValueError(f"unknown transport {transport!r}: expected one of {', '.join(TRANSPORTS)}")
    if transport == "redis":
        with running_valkey() as server:
            yield server
        return
    broker = Broker("tcp://127.0.0.1:*", load_fleet())
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


@contextlib.contextmanager
def serving_here(checkpoint: Path, cut: str | None = None) -> Iterator[str]:
    """The address of a broker in this process that has a worker of a checkpoint, here as well."""
    with running_broker() as broker:
        worker = start_worker(checkpoint, broker.address, cut=cut)
        try:
            yield broker.address
        finally:
            worker.stop()


@contextlib.contextmanager
def joined(
    broker: str, checkpoint: Path, head: int = 2, tail: int = 2, **options: Any
) -> Iterator[tuple[Any, Worker]]:
    """A split model and the worker that serves it, on a broker that runs already."""
    worker = start_worker(checkpoint, broker, f"{head}:{-tail or ''}")
    try:
        with SplitModelForCausalLM.from_pretrained(
            checkpoint, broker=broker, head_layers=head, tail_layers=tail, **options
        ) as model:
            yield model, worker
    finally:
        worker.stop()


@contextlib.contextmanager
def replaced(
    worker: Worker,
    checkpoint: Path,
    broker: str,
    due: Callable[[], bool],
    before: Callable[[], object] = lambda: None,
) -> Iterator[Callable[..., None]]:
    """A callback that starts another worker and stops this one, as soon as that is due. The other one stops last.

    Args:
        before: called before the other worker is started.
    """
    others: list[Worker] = []

    def strike(*_: object) -> None:
        if not others and due():
            before()
            others.append(start_worker(checkpoint, broker))
            worker.stop()

    try:
        yield strike
    finally:
        for other in others:
            other.stop()


@contextlib.contextmanager
def split_model(checkpoint: Path, head: int = 2, tail: int = 2, **options: Any) -> Iterator[Any]:
    """A split model with a broker and a worker of its own."""
    with running_broker() as broker, joined(broker.address, checkpoint, head, tail, **options) as (model, _):
        yield model


def generates(model: Any, prompt: torch.Tensor) -> bool:
    """Whether there is a worker, and it stays for as long as a generation takes."""
    with contextlib.suppress(NoWorker, SessionLost):
        model.generate(prompt, max_new_tokens=3)
        return True
    return False

"""One run of the stress command: starts the fleet, lets the faults strike, ends it all, and sums up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from split_common.system.console import stderr
from split_common.system.servers import RedisServer, free_port
from split_common.system.signals import exit_on_sigterm
from split_device.stress import tiny_model, tiny_unet
from split_device.stress.chaos import OF_THE_NETWORK, Chaos
from split_device.stress.ledger import Ledger
from split_device.stress.live import shown
from split_device.stress.memory import Memory, Resident
from split_device.stress.plan import STRESS_CUT, StressPlan, WorkloadKind
from split_device.stress.processes import DeviceProcess, Supervised, command
from split_device.stress.proxy import proxied
from split_device.stress.report import Report, report

#: Seconds between two looks at what goes on.
TURN = 0.25

#: Seconds that devices have to end their last request once the faults are over: as long as they bear their absence.
FINISHING = 240.0

#: Seconds after which nothing is left in Redis of those that were killed.
LEASES = 15.0

#: Memory for keys and values of a worker that serves the random model: soon all touched, so that it grows no more.
KV_MEMORY = "8MiB"

#: Seconds that workers have to end their sessions; at the end there are none.
DRAIN = "2"


@dataclass(frozen=True)
class StressOutcome:
    """What the command prints and draws."""

    report: Report
    ledger: Ledger
    chaos: Chaos | None


def run(plan: StressPlan, directory: Path, stack: contextlib.ExitStack) -> StressOutcome:
    """Runs the plan; `directory` takes the model, logs and keys of the run. What it starts, `stack` ends.

    Raises:
        SplitError: a process could not be started.
    """
    build = {"text": tiny_model.build, "image": tiny_unet.build}
    models = {kind: plan.model or str(build[kind](directory / f"stress-{kind}", plan.seed)) for kind in plan.kinds}
    env = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    if plan.broker is None:
        (directory / "runtime").mkdir(mode=0o700)
        (directory / "config").mkdir(mode=0o700)
        env |= {"LAMBDA_SPLIT_KEYS": "", "LAMBDA_SPLIT_CONFIG": str(directory / "config")}
        env |= {"LAMBDA_SPLIT_RUNTIME": str(directory / "runtime")}

    stack.enter_context(exit_on_sigterm())
    stderr.print(f"starting {plan.workers} workers and {plan.devices} devices on this machine …")
    queue, server = _queue(plan, directory, env, stack)
    proxy, address = None, server
    if set(plan.chaos) & set(OF_THE_NETWORK):
        proxy, address = proxied(server)
        stack.callback(proxy.close)
    workers = [
        Supervised(
            f"worker {index}",
            command(_serve(plan, plan.kind(index), models, address), directory / f"worker-{index}.log", env),
        )
        for index in range(plan.workers)
    ]
    stack.enter_context(_started(workers))
    ledger = Ledger()
    devices = [
        DeviceProcess(
            index,
            [*_ask(plan, plan.kind(index), models, address), "--index", str(index)],
            directory / f"device-{index}.log",
            env,
            ledger,
        )
        for index in range(plan.devices)
    ]
    stack.enter_context(_finished(devices))

    chaos = Chaos(list(plan.chaos), plan.seed, workers, queue, proxy) if plan.chaos else None
    kept = [*workers, *([queue] if queue is not None else [])]
    ledger.began = time.monotonic()
    memory, interrupted = _watch(plan, ledger, chaos, kept, devices)
    seconds = time.monotonic() - ledger.began
    left = _left(server) if queue is not None and plan.transport == "redis" else None
    return StressOutcome(
        report(plan.transport, plan.seed, seconds, ledger, chaos, memory, left, interrupted), ledger, chaos
    )


def _serve(plan: StressPlan, kind: WorkloadKind, models: dict[WorkloadKind, str], address: str) -> list[str]:
    """The command of a worker."""
    serve = ["worker", "--model", models[kind], "--broker", address, "--dtype", "float32", *_keys(plan)]
    serve += ["--threads", "1", "--drain-timeout", DRAIN]
    if kind == "image":
        return [*serve, "--cut", STRESS_CUT]
    serve += ["--layers", f"{plan.head_layers}:{-plan.tail_layers or ''}"]
    return [*serve, *(["--kv-memory", KV_MEMORY] if plan.model is None else [])]


def _ask(plan: StressPlan, kind: WorkloadKind, models: dict[WorkloadKind, str], address: str) -> list[str]:
    """The command of a device."""
    ask = ["stress-device", "--kind", kind, "--model", models[kind], "--broker", address, *_keys(plan)]
    ask += ["--seed", str(plan.seed)]
    ask += ["--head-layers", str(plan.head_layers), "--tail-layers", str(plan.tail_layers)]
    ask += ["--requests", str(plan.requests)] if plan.requests is not None else []
    ask += ["--reference", plan.reference] if plan.reference is not None else []
    return ask


def _keys(plan: StressPlan) -> list[str]:
    return ["--keys", str(plan.keys)] if plan.keys is not None else []


def _queue(
    plan: StressPlan, directory: Path, env: dict[str, str], stack: contextlib.ExitStack
) -> tuple[Supervised | None, str]:
    """The queue's server, unless there is one already, and the queue's address."""
    if plan.broker is not None:
        return None, plan.broker
    if plan.transport == "redis":
        server = RedisServer(directory, persistent=True)
        address = server.address
        queue = Supervised("redis", server.running)
    else:
        address = f"tcp://127.0.0.1:{free_port()}"
        queue = Supervised("broker", command(["broker", "--bind", address], directory / "broker.log", env))
    stack.enter_context(_started([queue]))
    return queue, address


@contextlib.contextmanager
def _started(processes: list[Supervised]) -> Iterator[None]:
    """Starts processes, waits until all are ready, and ends them at last."""
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.wait()
        yield
    finally:
        _end(processes)


def _end(processes: list[Supervised]) -> None:
    for process in processes:
        process.end()
    for process in processes:
        process.join()


@contextlib.contextmanager
def _finished(devices: list[DeviceProcess]) -> Iterator[None]:
    """Starts devices, waits until all are ready; those that have not ended at last are killed."""
    try:
        for device in devices:
            device.start()
        for device in devices:
            device.wait()
        yield
    finally:
        for device in devices:
            device.kill()
        for device in devices:
            device.join()


def _watch(
    plan: StressPlan, ledger: Ledger, chaos: Chaos | None, kept: list[Supervised], devices: list[DeviceProcess]
) -> tuple[list[Resident], bool]:
    """Lets the faults strike until the time is over or all is answered; then devices end what they have.

    Returns:
        The memory of the processes that were there at the end, and whether Ctrl-C ended the time.
    """
    memory = Memory()
    interrupted = False
    with shown(ledger, chaos, [each for each in kept if each.name.startswith("worker")]) as show:

        def turn() -> bool:
            """Whether some device still runs."""
            memory.look([*kept, *devices])
            show()
            time.sleep(TURN)
            return not all(device.finished for device in devices)

        try:
            if chaos is not None:
                chaos.start()
            while turn():
                if plan.seconds is not None and time.monotonic() - ledger.began >= plan.seconds:
                    break
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if chaos is not None:
                chaos.close()
        for device in devices:
            device.finish()
        deadline = time.monotonic() + FINISHING
        while turn() and time.monotonic() < deadline:
            pass
    return memory.residents, interrupted


def _left(address: str) -> dict[str, int]:
    """Entries in streams, and those that were read and not acknowledged, once the leases of the dead are over."""
    import redis

    deadline = time.monotonic() + LEASES
    with redis.Redis.from_url(address) as client:
        while True:
            entries = pending = 0
            for key in client.scan_iter(_type="stream"):
                entries += client.xlen(key)
                pending += sum(group["pending"] for group in client.xinfo_groups(key))
            if not (entries or pending) or time.monotonic() > deadline:
                return {"entries": entries, "pending": pending}
            time.sleep(TURN)

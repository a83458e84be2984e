"""One run of the stress command: starts the fleet, causes the faults, ends the fleet, and sums up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from split_common.models.split import DEFAULT_CUT
from split_common.system.console import stderr
from split_common.system.servers import RedisServer, free_port
from split_common.system.signals import exit_on_sigterm
from split_device.stress import tiny_model, tiny_unet
from split_device.stress.chaos import Chaos
from split_device.stress.hostile import fleet as hostile_fleet
from split_device.stress.hostile.slices import Slices, Update
from split_device.stress.ledger import Ledger
from split_device.stress.live import shown
from split_device.stress.membership import Membership, OwnKeys, SharedKeys
from split_device.stress.memory import Memory, Resident
from split_device.stress.plan import NETWORK_FAULTS, NICENESS, StressPlan, WorkloadKind
from split_device.stress.processes import DeviceProcess, Supervised, command
from split_device.stress.proxy import proxied
from split_device.stress.report import Report, report

#: Interval between two updates of the view, in seconds.
UPDATE_INTERVAL = 0.25

#: How long devices may take to finish their last request after the faults, in seconds: at least as long as they
#: wait for the broker and for workers.
FINISH_TIMEOUT = 240.0

#: Time after which Redis holds nothing of killed processes, in seconds.
LEASES_END = 15.0

#: `--kv-memory` of a worker with the random model: so small that soon all of it is used, and memory stops growing.
KV_MEMORY = "8MiB"

#: Number of requests after which devices leave the queue and join it again, beside a hostile member.
REJOIN = "4"

#: `--drain-timeout` of the workers, in seconds: at the end no sessions are open.
DRAIN_TIMEOUT = "2"


@dataclass(frozen=True)
class StressOutcome:
    """The results that the command prints and plots."""

    report: Report
    ledger: Ledger
    chaos: Chaos | None


def run(plan: StressPlan, directory: Path, stack: contextlib.ExitStack) -> StressOutcome:
    """Runs the plan.

    Args:
        directory: for the models, logs and keys of the run.
        stack: ends the processes that the run starts.

    Raises:
        SplitError: a process could not be started.
    """
    stderr.print(f"starting {plan.workers} workers and {plan.devices} devices on this machine …")
    build = {"text": tiny_model.build, "agents": tiny_model.build, "image": tiny_unet.build}
    models = {kind: plan.model or str(build[kind](directory / f"stress-{kind}", plan.seed)) for kind in plan.kinds}
    env = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    if plan.broker is None:
        (directory / "runtime").mkdir(mode=0o700)
        (directory / "config").mkdir(mode=0o700)
        env |= {"LAMBDA_SPLIT_KEYS": "", "LAMBDA_SPLIT_CONFIG": str(directory / "config")}
        env |= {"LAMBDA_SPLIT_RUNTIME": str(directory / "runtime")}

    stack.enter_context(exit_on_sigterm())
    targets = hostile_fleet.read_targets(plan, models) if plan.hostile else {}
    own = hostile_fleet.own_keys(plan, directory / "members", targets) if plan.hostile else None
    members: Membership = own or SharedKeys(plan.keys)
    queue, server = _queue(plan, directory, env, own, stack)
    proxy, address = None, server
    if set(plan.chaos) & set(NETWORK_FAULTS):
        proxy, address = proxied(server)
        stack.callback(proxy.close)
    workers = _workers(plan, models, members, address, directory, env)
    stack.enter_context(_started(workers))
    ledger = Ledger()
    devices = _devices(plan, models, members, address, directory, env, ledger)
    stack.enter_context(_finished(devices))

    chaos = Chaos(list(plan.chaos), plan.seed, workers, queue, proxy) if plan.chaos else None
    supervised = [*workers, *([queue] if queue is not None else [])]
    slices = None
    if own is not None:
        commands = hostile_fleet.Commands(own, targets, server, plan.seed)
        slices = Slices(plan, ledger, supervised, devices, commands, directory / "hostile.log")
    ledger.began = time.monotonic()
    during = slices.run if slices is not None else partial(_until_the_end, plan, ledger)
    memory, interrupted = _run_faults(during, ledger, chaos, supervised, devices)
    seconds = time.monotonic() - ledger.began
    # What a hostile member has left there is its own.
    left = _left(server) if queue is not None and plan.transport == "redis" and slices is None else None
    hostile = slices.outcome if slices is not None else None
    summed_up = report(plan.transport, plan.seed, seconds, ledger, chaos, memory, left, interrupted, hostile)
    return StressOutcome(summed_up, ledger, chaos)


def _workers(
    plan: StressPlan,
    models: dict[WorkloadKind, str],
    members: Membership,
    address: str,
    directory: Path,
    env: dict[str, str],
) -> list[Supervised]:
    workers = []
    for index in range(plan.workers):
        name = f"worker {index}"
        words = _worker_command(plan, plan.kind(index), models, members.address(address, name))
        log = directory / f"worker-{index}.log"
        start = command([*words, *members.options(name)], log, env | members.env(name))
        workers.append(Supervised(name, start))
    return workers


def _devices(
    plan: StressPlan,
    models: dict[WorkloadKind, str],
    members: Membership,
    address: str,
    directory: Path,
    env: dict[str, str],
    ledger: Ledger,
) -> list[DeviceProcess]:
    devices = []
    for index in range(plan.devices):
        name = f"device {index}"
        words = _device_command(plan, plan.kind(index), models, members.address(address, name))
        words += [*members.options(name), "--index", str(index)]
        log = directory / f"device-{index}.log"
        devices.append(DeviceProcess(index, words, log, env | members.env(name), ledger))
    return devices


def _worker_command(
    plan: StressPlan, kind: WorkloadKind, models: dict[WorkloadKind, str], address: str
) -> list[str]:
    """The command of a worker, without its keys."""
    words = ["worker", "--model", models[kind], "--broker", address, "--dtype", "float32"]
    words += ["--threads", "1", "--drain-timeout", DRAIN_TIMEOUT]
    if kind == "image":
        return [*words, "--cut", DEFAULT_CUT]
    words += ["--layers", str(plan.layers)]
    return [*words, *(["--kv-memory", KV_MEMORY] if plan.model is None else [])]


def _device_command(
    plan: StressPlan, kind: WorkloadKind, models: dict[WorkloadKind, str], address: str
) -> list[str]:
    """The command of a device, without its keys and its index."""
    words = ["stress-device", "--kind", kind, "--model", models[kind], "--broker", address]
    words += ["--seed", str(plan.seed), "--layers", str(plan.layers)]
    words += ["--requests", str(plan.requests)] if plan.requests is not None else []
    words += ["--reference", plan.reference] if plan.reference is not None else []
    # A hostile member that attacks set-ups and placement harms only those who need a new channel. Beside it, all
    # processes have the same priority, as each has a machine of its own: what a worker computes for the hostile
    # member must not take the CPU that honest devices need.
    words += ["--rejoin", REJOIN] if plan.hostile else ["--niceness", str(NICENESS)]
    return words


def _queue(
    plan: StressPlan, directory: Path, env: dict[str, str], own: OwnKeys | None, stack: contextlib.ExitStack
) -> tuple[Supervised | None, str]:
    """Starts the queue's server, unless it runs already; returns the server and its address."""
    if plan.broker is not None:
        return None, plan.broker
    if plan.transport == "redis":
        options = ("--aclfile", str(own.acl_file()), *hostile_fleet.REDIS_LIMITS) if own is not None else ()
        # What a hostile member fills a server with is not worth a disk's time.
        server = RedisServer(directory, *options, persistent=own is None)
        address = server.address
        queue = Supervised("redis", server.running)
    else:
        address = f"tcp://127.0.0.1:{free_port()}"
        words = ["broker", "--bind", address]
        words += [*own.options("broker"), *hostile_fleet.BROKER_LIMITS] if own is not None else []
        queue = Supervised("broker", command(words, directory / "broker.log", env))
    stack.enter_context(_started([queue]))
    return queue, address


@contextlib.contextmanager
def _started(processes: list[Supervised]) -> Iterator[None]:
    """Starts processes, waits until all are ready, and ends them after the `with` block."""
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
    """Starts devices and waits until all are ready. Those that still run after the `with` block are killed."""
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


def _until_the_end(plan: StressPlan, ledger: Ledger, update: Update) -> None:
    """Lets time pass until it is over, or all requests are answered."""
    while update():
        if plan.seconds is not None and time.monotonic() - ledger.began >= plan.seconds:
            return


def _run_faults(
    during: Callable[[Update], None],
    ledger: Ledger,
    chaos: Chaos | None,
    supervised: list[Supervised],
    devices: list[DeviceProcess],
) -> tuple[list[Resident], bool]:
    """Causes faults until `during` returns; then devices finish their last request.

    Returns:
        The memory of the processes that ran at the end, and whether Ctrl-C ended the requests.
    """
    memory = Memory()
    interrupted = False
    with shown(ledger, chaos, [each for each in supervised if each.name.startswith("worker")]) as show:

        def update() -> bool:
            """Updates memory and view; returns whether some device still runs."""
            memory.sample([*supervised, *devices])
            show()
            time.sleep(UPDATE_INTERVAL)
            return not all(device.finished for device in devices)

        try:
            if chaos is not None:
                chaos.start()
            during(update)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if chaos is not None:
                chaos.close()
        for device in devices:
            device.finish()
        deadline = time.monotonic() + FINISH_TIMEOUT
        while update() and time.monotonic() < deadline:
            pass
    return memory.residents, interrupted


def _left(address: str) -> dict[str, int]:
    """Number of entries in streams, and of unacknowledged ones, once the leases of killed processes have ended."""
    import redis

    deadline = time.monotonic() + LEASES_END
    with redis.Redis.from_url(address) as client:
        while True:
            entries = pending = 0
            for key in client.scan_iter(_type="stream"):
                entries += client.xlen(key)
                pending += sum(group["pending"] for group in client.xinfo_groups(key))
            if not (entries or pending) or time.monotonic() > deadline:
                return {"entries": entries, "pending": pending}
            time.sleep(UPDATE_INTERVAL)

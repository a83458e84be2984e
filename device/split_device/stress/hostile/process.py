"""The process of a hostile member, and that of a bystander, which burns as much CPU and talks to nobody."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from split_common.protocol import headers
from split_common.system.console import emit_json
from split_common.system.signals import catch_sigterm, wait_until_set
from split_common.trust.fleet import Fleet
from split_device.stress.hostile import connections, frames, images, redis_keys, sessions, setups, workers
from split_device.stress.hostile.modes import MODES
from split_device.stress.hostile.scene import Scene

#: Seconds that a mode may take to end; then its process ends without it.
END_TIMEOUT = 0.5

#: Threads of a bystander: at first as many as a mode and its sockets have, because a busy machine shares itself by
#: threads; and more, as long as they do not get the CPU that the hostile member had.
BYSTANDER_THREADS, MOST_THREADS = 4, 64

#: Seconds between two looks whether a bystander falls behind, and the seconds of CPU time by which it may.
LOOK, BEHIND = 0.1, 0.1

#: Bytes that a bystander hashes at a time, which takes less than a millisecond, and the length of its naps in
#: seconds. hashlib releases the GIL for such sizes, so that threads burn several cores.
CHUNK, NAP = 256 * 1024, 0.005


def attacks() -> dict[str, Callable[[Scene], None]]:
    """The function of each of `MODES`. It acts until the scene ends."""
    families = (connections, frames, images, redis_keys, sessions, setups, workers)
    return {name: attack for family in families for name, attack in family.ATTACKS.items()}


def run_hostile(
    mode: str, broker: str, keys: Path, service: headers.Service, model: str, width: int, seed: int
) -> None:
    """Acts as a hostile member until SIGTERM, and then says what was done.

    Args:
        mode: one of `MODES`.
        broker: address of the queue.
        keys: the member's directory.
        service: the body that honest workers serve.
        model: directory of the checkpoint.
        width: of the body's hidden states; 0 for images.
        seed: of what is drawn at random.
    """
    stop = catch_sigterm()
    fleet = Fleet.open(keys)
    scene = Scene(broker, fleet, fleet.identity(MODES[mode].role), service, model, width, stop, seed)
    failure: list[str] = []

    def act() -> None:
        try:
            attacks()[mode](scene)
            if scene.running:
                failure.append("it ended early")
        except Exception as error:
            failure.append(f"{type(error).__name__}: {error}")

    emit_json({"pid": os.getpid()})
    thread = threading.Thread(target=act, name="hostile", daemon=True)
    thread.start()
    wait_until_set(stop)
    thread.join(END_TIMEOUT)
    emit_json({"counts": dict(scene.counts), "failure": failure[0] if failure else None})
    # Its connections break off, as those of a process that is killed.
    os._exit(0)


def run_bystander(cores: float) -> None:
    """Burns CPU until SIGTERM, evenly over time.

    Args:
        cores: how much, in seconds of CPU time per second.
    """
    stop = catch_sigterm()
    emit_json({"pid": os.getpid()})
    threading.Thread(target=burn, args=(cores, stop), name="bystander", daemon=True).start()
    wait_until_set(stop)
    emit_json({"counts": {"acts": 1}, "failure": None})


def burn(
    cores: float,
    stop: threading.Event,
    cpu_time: Callable[[], float] = time.process_time,
    threads: int = MOST_THREADS,
) -> int:
    """Burns CPU until `stop`, on as many threads as it takes.

    Args:
        cores: what this process burns, in seconds of CPU time per second.
        cpu_time: the CPU time that this process has taken, in seconds.
        threads: the most.

    Returns:
        The number of threads that it took.
    """
    data, began, burned = bytes(CHUNK), time.monotonic(), cpu_time()

    def behind() -> float:
        return cores * (time.monotonic() - began) - (cpu_time() - burned)

    def work() -> None:
        while not stop.is_set():
            if behind() > 0:
                hashlib.blake2b(data).digest()
            else:
                stop.wait(NAP)

    working: list[threading.Thread] = []
    while not stop.is_set():
        wanted = min(BYSTANDER_THREADS, threads) if not working else len(working)
        if working and behind() > BEHIND and len(working) < threads:
            wanted += 1
        while len(working) < wanted:
            working.append(threading.Thread(target=work, name="bystander", daemon=True))
            working[-1].start()
        stop.wait(LOOK)
    for thread in working:
        thread.join()
    return len(working)

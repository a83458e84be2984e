"""Modes that attack what a worker keeps for sessions: memory, places, the queue, replies."""

from __future__ import annotations

import contextlib
import itertools
import queue
import time
from collections.abc import Callable

from split_common.protocol import headers, payloads
from split_device.stress.hostile.peers import DeviceChannel, linked_channel, step
from split_device.stress.hostile.scene import Scene

#: Rows of a step, and tokens of each row: less than the models' positions, and well below the largest body.
ROWS, TOKENS = 64, 240

#: Rows of the step whose reply is repeated: it is computed at once, and has a megabyte.
REPLY_ROWS = 16

#: Seconds between two requests that keep a session from counting as idle (`WorkerLimits.evict_after`).
KEEP_INTERVAL = 2.0

#: Sessions that one member tries to hold: twice as many as a worker takes by default.
SESSIONS = 2048

#: Seconds between two requests of modes that do not wait for answers.
PACE = 0.002

#: Longest time, in seconds, that a mode waits for an answer before it goes on without.
NO_LONGER = 1.0


def forks(scene: Scene) -> None:
    """Forks a session into itself, again and again: its rows must not be lost to all others."""
    while scene.running:
        with scene.attempt(), linked_channel(scene) as channel:
            while scene.running:
                _fork_into_itself(scene, channel, scene.number())


def _fork_into_itself(scene: Scene, channel: DeviceChannel, session: int) -> None:
    channel.request(session, 0, *step(scene, ROWS, 16))
    channel.answered()
    for seq in range(1, 40, 2):
        if not scene.running:
            break
        channel.request(session, seq, payloads.Fork(session, 0))
        channel.request(session, seq + 1, *step(scene, ROWS, 16))
        for _ in range(2):
            with contextlib.suppress(queue.Empty):
                channel.answered(NO_LONGER)
    channel.request(session, 41, payloads.Close())


def sessions(scene: Scene) -> None:
    """Opens sessions, and repeats the first request of each so that none counts as idle."""
    while scene.running:
        with scene.attempt(), linked_channel(scene) as channel:
            held = []
            for _ in range(SESSIONS):
                if not scene.running:
                    return
                held.append(channel.request(scene.number(), 0, *step(scene, 1, 1)))
                scene.pause(PACE)
            _keep(scene, channel, held)


def kv(scene: Scene) -> None:
    """Fills the memory of keys and values by several sessions at once, and repeats old requests to keep it."""
    while scene.running:
        with scene.attempt(), linked_channel(scene) as channel:
            held = []
            for _ in range(4):
                held.append(channel.request(scene.number(), 0, *step(scene, ROWS, TOKENS)))
                with contextlib.suppress(queue.Empty):
                    channel.answered(NO_LONGER)
            _keep(scene, channel, held, rounds=3)


def _keep(
    scene: Scene, channel: DeviceChannel, held: list[tuple[headers.Relay, bytes]], rounds: int = 1000
) -> None:
    """Sends old requests again at intervals; those that are small say only that the session is in use."""
    for _ in range(rounds):
        for header, _ in held:
            if not scene.running:
                return
            channel.request(header.session, 0, payloads.PartRequest(0, 1))
            scene.pause(PACE)
        scene.pause(KEEP_INTERVAL)


def flood(scene: Scene) -> None:
    """Sends steps of the largest size without waiting for answers."""
    payload, tensor = step(scene, ROWS, TOKENS)
    while scene.running:
        with scene.attempt(), linked_channel(scene) as channel:
            # The link drops what the queue does not take, so that this process does not grow.
            while scene.running:
                session = scene.number()
                for seq in range(16):
                    channel.request(session, seq, payload, tensor)
                    scene.pause(PACE)


def replies(scene: Scene) -> None:
    """Has one large reply repeated by small requests under its number."""
    while scene.running:
        with scene.attempt(), linked_channel(scene) as channel:
            session = scene.number()
            channel.request(session, 0, *step(scene, REPLY_ROWS, TOKENS))
            channel.answered()
            repeat_reply(scene, channel, session, lambda: None)


def repeat_reply(scene: Scene, channel: DeviceChannel, session: int, between: Callable[[], None]) -> None:
    """Asks for the reply 0 of a session until the end, or for as long as a session is usually held."""
    until = time.monotonic() + 5.0
    while scene.running and time.monotonic() < until:
        channel.request(session, 0, payloads.PartRequest(0, 1))
        between()
        scene.pause(PACE)


def closes(scene: Scene) -> None:
    """Closes sessions that were never opened."""
    while scene.running:
        with scene.attempt(), linked_channel(scene) as channel:
            for number in itertools.count(1):
                if not scene.running:
                    return
                channel.request(number, 0, payloads.Close())
                if number % 64 == 0:
                    scene.pause(PACE)


ATTACKS: dict[str, Callable[[Scene], None]] = {
    "forks": forks,
    "sessions": sessions,
    "kv": kv,
    "queue": flood,
    "replies": replies,
    "closes": closes,
}

"""The mode that attacks workers of images: steps that take much less to send than to compute."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from split_common.protocol import payloads
from split_device.stress.hostile.peers import DeviceChannel, linked_channel
from split_device.stress.hostile.scene import Scene

#: Heights and widths of the states, and the rows of a step: from far beyond any limit to what is allowed.
SHAPES = ((512, 1), (256, 1), (128, 2), (64, 4), (32, 16), (16, 64), (8, 256))

#: Tokens of the embeddings.
EMBEDDED = 77

#: Seconds that the mode waits for the answer to a step before it sends another one.
NO_LONGER = 0.2


@dataclass(frozen=True)
class UNetShape:
    """What a step of a UNet needs to know of it: the channels of the states, and the widths of embeddings."""

    channels: int
    time_width: int
    text_width: int

    @classmethod
    def read(cls, directory: Path, first: int) -> UNetShape:
        """Reads a checkpoint's configuration; `first` is the body's first block."""
        config = json.loads((directory / "config.json").read_text())
        channels = config["block_out_channels"]
        return cls(
            channels[first - 1],
            config.get("time_embedding_dim") or 4 * channels[0],
            config["cross_attention_dim"],
        )


def image_steps(scene: Scene) -> None:
    """Sends steps of images in int4, eight times as large once they are decoded, and of growing cost."""
    shape = UNetShape.read(Path(scene.model), scene.service.first)
    while scene.running:
        with scene.attempt(), linked_channel(scene) as channel:
            while scene.running:
                for side, rows in SHAPES:
                    _send(scene, channel, shape, side, rows)


def _send(scene: Scene, channel: DeviceChannel, shape: UNetShape, side: int, rows: int) -> None:
    session = scene.number()
    key = scene.random.randbytes(32)
    text = payloads.Array("float32", [1, EMBEDDED, shape.text_width])
    channel.request(session, 0, payloads.Conditioning(key, [text]), bytes(text.nbytes))
    states = payloads.Array("int4", [rows, shape.channels, side, side])
    time = payloads.Array("float32", [rows, shape.time_width])
    step = payloads.Denoise(key, [0] * rows, [states, time], "int4")
    channel.request(session, 1, step, bytes(step.tensor_bytes))
    try:
        for _ in range(2):
            channel.answered(NO_LONGER)
    except queue.Empty:
        scene.counts["unanswered"] += 1
    channel.request(session, 2, payloads.Close())


ATTACKS: dict[str, Callable[[Scene], None]] = {"image-steps": image_steps}

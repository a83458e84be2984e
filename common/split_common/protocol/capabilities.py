"""Capabilities: what a peer may not support. The two ends of a channel use what both have.

Set-up says them, inside the transcript that is signed (`split_common.protocol.handshake`). New kinds of requests,
rows and codecs add their names here, and payloads say which ones they need.

Nothing here imports torch.
"""

from __future__ import annotations

from typing import Literal, get_args

#: Without this capability, a peer knows sessions by numbers only.
SESSION_KEYS = "session-keys"

#: A worker with this capability computes a row differently from the unsplit model if it has padding to its left,
#: which does not travel. Devices refuse such rows.
UNPADDED = "unpadded"

#: A worker with this capability computes tokens differently if they go through in parts and not together. Devices
#: send them in one message, also to a worker that takes over.
INDIVISIBLE = "indivisible"

#: A worker with this capability holds a session on that its device has finished with, for copies of it.
KEEP = "keep"

#: A worker with this capability returns only those outputs that a `BriefStep` asks for.
OUTPUTS = "outputs"

#: A worker with this capability pads the answer to a `PaddedStep` to the size that the step asks for.
PADDED_STEPS = "padded-steps"

#: A worker with this capability takes a `TreeStep`: several continuations of a row at once.
TREES = "trees"

#: A worker with this capability takes tokens of images whose positions differ on several axes.
POSITION_AXES = "position-axes"

#: A worker with this capability takes tokens of images that attend to each other both ways.
SPANS = "spans"

#: Encoding of a language model's hidden states, unless they travel as they are (`split_common.models.codecs`).
StatesCodec = Literal["lossless", "int8", "int4"]


def states_capability(codec: StatesCodec) -> str:
    """The capability of encoding hidden states by a codec."""
    return f"states-{codec}"


#: All. "adapters" gives a session one of the adapters that its worker has loaded; "fork" copies a session on its
#: worker; "int4" and "int8" encode images; "session-keys" names sessions by keys, as in version 2 of the headers.
CAPABILITIES = frozenset(
    {
        *("adapters", "fork", INDIVISIBLE, "int4", "int8", KEEP, OUTPUTS, PADDED_STEPS, SESSION_KEYS, TREES),
        UNPADDED,
        *(POSITION_AXES, SPANS, *map(states_capability, get_args(StatesCodec))),
    }
)

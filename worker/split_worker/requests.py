"""A request on its way through the worker, and the refusal that a device gets instead of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from split_common.engine.scheduler import is_prefill
from split_common.errors import (
    Busy,
    Evicted,
    Malformed,
    NeedEmbeddings,
    NonFinite,
    Oversized,
    PromptTooLong,
    SplitError,
    UnknownAdapter,
)
from split_common.protocol import headers, payloads
from split_worker.sessions import Session


class Closed(Exception):
    """The session was closed, and its requests are not answered."""


#: The reason that a device is told for each error. All other errors end the session as "failed".
REASONS: dict[type[Exception], str] = {
    Busy: "busy",
    NonFinite: "non-finite",
    Malformed: "malformed",
    Oversized: "malformed",
    PromptTooLong: "too-long",
    NeedEmbeddings: "embeddings",
    UnknownAdapter: "adapter",
    Evicted: "evicted",
}

#: Bytes for which a waiting request counts beside its body.
REQUEST_BYTES = 1024

#: Most characters of an error's message that a device is told.
MAX_MESSAGE = 2048


@dataclass(eq=False)
class PendingRequest:
    """A request to compute: decrypted, in order, and of an open session."""

    session: Session[Any]
    header: headers.Relay
    payload: payloads.AnyRequest
    tensor: memoryview
    #: Bytes that its decrypted body keeps in memory, see `encoding.held_bytes`.
    held_bytes: int
    #: When it arrived, in seconds of `time.perf_counter`.
    arrived: float
    #: Seconds that this process has spent on it so far, apart from waiting and forwards.
    host_seconds: float = 0.0
    #: Whether its tensor was let go, because the session was closed before it began.
    released: bool = False

    def release(self) -> None:
        """Lets go of its tensor."""
        self.tensor, self.released = memoryview(b""), True

    @property
    def tokens(self) -> int:
        """Tokens that it appends; 0 unless it is a step of a language model."""
        return self.payload.tokens if isinstance(self.payload, payloads.Step) else 0

    @property
    def queued_bytes(self) -> int:
        """Bytes that it counts for while it waits."""
        return self.held_bytes + REQUEST_BYTES

    @property
    def numbers(self) -> int:
        """Numbers in its tensors; 0 unless it is a step of an image."""
        return sum(array.size for array in self.payload.arrays) if isinstance(self.payload, payloads.Denoise) else 0

    @property
    def prefill(self) -> bool:
        """Whether it is prefill, which may wait and may be computed in chunks."""
        if isinstance(self.payload, payloads.TreeStep) and self.tokens <= payloads.MAX_TREE:
            # Its device waits for the next tokens.
            return False
        return is_prefill(self.tokens)


def refusal(error: Exception) -> payloads.Refusal:
    """The answer to a request that has failed. Of an unforeseen error, only the type is reported."""
    reason = REASONS.get(type(error), "failed")
    message, retry_after = type(error).__name__, 0.0
    if isinstance(error, SplitError):
        message, retry_after = str(error), min(error.retry_after or 0.0, headers.MAX_RETRY_AFTER)
    return payloads.Refusal(reason, message[:MAX_MESSAGE], retry_after)  # type: ignore[arg-type]

"""The errors that a worker's refusals stand for."""

from __future__ import annotations

from split_common.errors import (
    Busy,
    Malformed,
    NeedEmbeddings,
    NonFinite,
    PromptTooLong,
    SessionLost,
    SplitError,
    StepFailed,
    UnknownAdapter,
)
from split_common.protocol import payloads

#: Least seconds before a retry, whatever a peer asks for.
MIN_RETRY = 0.1


def refusal_error(refusal: payloads.Refusal) -> SplitError:
    """The error that a worker's refusal stands for."""
    message = f"the worker refused: {printable(refusal.message)}"
    match refusal.reason:
        case "busy":
            return Busy(message, max(MIN_RETRY, refusal.retry_after))
        case "non-finite":
            return NonFinite(message)
        case "malformed":
            return Malformed(message)
        case "too-long":
            return PromptTooLong(message)
        case "embeddings":
            return NeedEmbeddings(message)
        case "adapter":
            return UnknownAdapter(message)
        case "failed":
            return StepFailed(message)
        case _:
            return SessionLost(message)


def printable(text: str) -> str:
    """A peer's text without the characters that a terminal does not print."""
    return "".join(character for character in text if character.isprintable())

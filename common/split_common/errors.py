"""Every error that lambda-split raises on purpose; a command that one ends prints it as one line.

The exit code of such a command stands in parentheses where it is not 1::

    SplitError
    ├── ConfigError (2)
    │   └── KeysError (2)
    ├── ModelError
    │   ├── UnknownModel (2)
    │   ├── InvalidSplit (2), a ValueError too
    │   ├── MissingTensor
    │   ├── TensorMismatch
    │   └── UnsupportedArchitecture
    ├── UnsupportedFeature, a ValueError too
    ├── PromptTooLong, a ValueError too
    ├── ProtocolError
    │   ├── Malformed
    │   ├── Oversized
    │   ├── VersionMismatch
    │   ├── NonFinite
    │   └── OutOfOrder
    ├── AuthenticationError
    │   └── CertificateError
    ├── NeedEmbeddings
    ├── BrokerUnreachable
    ├── NoWorker
    ├── Busy
    ├── SessionLost
    │   ├── WorkerGone
    │   ├── WorkerSlow
    │   └── StepFailed
    ├── HistoryLost
    ├── WorkerFailed
    ├── JobsError
    │   ├── UnknownJob
    │   └── StoreLocked (2)
    └── AgentError
"""

from __future__ import annotations


class SplitError(Exception):
    """Base of all errors of lambda-split."""

    #: Exit code of the command line when this error ends a command.
    exit_code = 1

    #: Seconds after which another attempt may succeed; None where the error does not say.
    retry_after: float | None = None


class ConfigError(SplitError):
    """An option, address or file is wrong; nothing was started."""

    exit_code = 2


class KeysError(ConfigError):
    """A key, certificate, roster or manifest file is missing, damaged or readable by others."""


# --- the model and its parts -------------------------------------------------------------------------------


class ModelError(SplitError):
    """The model cannot be loaded or cut as asked."""


class UnknownModel(ModelError):
    """No checkpoint is found under this name or path."""

    exit_code = 2


class InvalidSplit(ModelError, ValueError):
    """`head_layers` and `tail_layers` leave no body, or are negative."""

    exit_code = 2


class MissingTensor(ModelError):
    """The checkpoint lacks a tensor of the part that was to be loaded."""


class TensorMismatch(ModelError):
    """A tensor differs from the one that the signed manifest names."""


class UnsupportedArchitecture(ModelError):
    """The model's class cannot be cut between layers; the message says why."""


class UnsupportedFeature(SplitError, ValueError):
    """An option of `generate` or `forward` that cannot be split; refused before anything is sent."""


class PromptTooLong(SplitError, ValueError):
    """The prompt (with the tokens to generate) exceeds the model's positions."""


# --- what comes from the network ---------------------------------------------------------------------------


class ProtocolError(SplitError):
    """A message that breaks the protocol; it is dropped and counted."""


class Malformed(ProtocolError):
    """Bytes that are not a message of this protocol, or fields that do not fit each other."""


class Oversized(ProtocolError):
    """A message or tensor above the limit."""


class VersionMismatch(ProtocolError):
    """The peer speaks another version of the protocol."""


class NonFinite(ProtocolError):
    """Hidden states that hold NaN or infinity."""


class OutOfOrder(ProtocolError):
    """A step whose sequence number or start position does not follow the session's state."""


class AuthenticationError(SplitError):
    """A peer, signature or ciphertext that cannot be trusted."""


class CertificateError(AuthenticationError):
    """A certificate of another fleet, outside its validity, of another role, or revoked."""


class NeedEmbeddings(SplitError):
    """The worker does not hold the embeddings that a step of an image job names; the device sends them again."""


# --- the queue and its sessions ----------------------------------------------------------------------------


class BrokerUnreachable(SplitError):
    """The broker did not answer in time."""


class NoWorker(SplitError):
    """No worker serves this model with this body; `served` says what is served here."""

    def __init__(self, message: str, served: str = "") -> None:
        super().__init__(message)
        self.served = served


class Busy(SplitError):
    """Every worker of this model is full; try again after `retry_after` seconds."""

    retry_after: float

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SessionLost(SplitError):
    """The worker that held the session's KV cache is gone, or refused to go on."""


class WorkerGone(SessionLost):
    """The worker that held the session died, left or fell silent.

    Args:
        held: number of this device's sessions of which it held a step then.
    """

    def __init__(self, message: str, held: int = 1) -> None:
        super().__init__(message)
        self.held = held


class WorkerSlow(SessionLost):
    """The worker that holds the session does not answer in time, and there is another one."""


class StepFailed(SessionLost):
    """The worker failed at a step; the session went with it."""


class HistoryLost(SplitError):
    """A session was lost, and what is needed to rebuild it could not be kept."""


class WorkerFailed(SplitError):
    """A worker cannot compute any more."""


# --- jobs --------------------------------------------------------------------------------------------------


class JobsError(SplitError):
    """What was asked of a job, or of the store of jobs, cannot be done."""


class UnknownJob(JobsError):
    """The store has no job of this id."""


class StoreLocked(JobsError):
    """The store of jobs is sealed under another key, or was damaged."""

    exit_code = 2


class AgentError(SplitError):
    """The agent runs already, does not run, or did not do as it was told."""

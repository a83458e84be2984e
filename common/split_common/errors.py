"""Every error that lambda-split raises on purpose. A command that one of them ends prints it as one line.

The exit code of the command is in parentheses if it is not 1::

    SplitError
    ├── ConfigError (2)
    │   ├── KeysError (2)
    │   └── UnsupportedField (2)
    ├── ModelError
    │   ├── UnknownModel (2)
    │   ├── UnknownAdapter (2)
    │   ├── InvalidSplit (2), a ValueError too
    │   ├── MissingTensor
    │   ├── TensorMismatch
    │   └── UnsupportedArchitecture
    ├── UnsupportedFeature, a ValueError too
    ├── ForkedProcess
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
    ├── Evicted
    ├── WorkerFailed
    ├── MeasurementTimeout
    ├── JobsError
    │   ├── UnknownJob
    │   └── StoreLocked (2)
    └── AgentError
"""

from __future__ import annotations


class SplitError(Exception):
    """Base of all errors of lambda-split."""

    #: Exit code of a command that this error ends.
    exit_code = 1

    #: Seconds after which another attempt may succeed; None if that is not known.
    retry_after: float | None = None


class ConfigError(SplitError):
    """An option, address or file is wrong; nothing was started."""

    exit_code = 2


class KeysError(ConfigError):
    """A key, certificate, roster or manifest file is missing, damaged or readable by others."""


class UnsupportedField(ConfigError):
    """A field of a request asks for something that this model, or its chat template, cannot do."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        #: Its name in OpenAI's format.
        self.field = field


# --- the model and its parts -------------------------------------------------------------------------------


class ModelError(SplitError):
    """The model cannot be loaded or split as requested."""


class UnknownModel(ModelError):
    """There is no checkpoint with this name or path."""

    exit_code = 2


class UnknownAdapter(ModelError):
    """The worker has not loaded the adapter that a session asks for, or the model has none of this name."""

    exit_code = 2


class InvalidSplit(ModelError, ValueError):
    """`head_layers` and `tail_layers` leave no body, or are negative."""

    exit_code = 2


class MissingTensor(ModelError):
    """The checkpoint lacks a tensor of the part to be loaded."""


class TensorMismatch(ModelError):
    """A tensor differs from the one in the signed manifest."""


class UnsupportedArchitecture(ModelError):
    """The model's class cannot be split between layers; the message says why."""


class UnsupportedFeature(SplitError, ValueError):
    """An option of `generate` or `forward` does not work with a split model; refused before anything is sent."""


class ForkedProcess(SplitError):
    """A model, generator or store was opened before this process was forked; refused before anything is sent."""


class PromptTooLong(SplitError, ValueError):
    """The prompt, with the tokens to generate, is longer than the model supports."""


# --- what comes from the network ---------------------------------------------------------------------------


class ProtocolError(SplitError):
    """A message breaks the protocol; it is dropped and counted."""


class Malformed(ProtocolError):
    """The bytes are not a message of this protocol, or its fields contradict each other."""


class Oversized(ProtocolError):
    """A message or tensor is larger than allowed."""


class VersionMismatch(ProtocolError):
    """The peer speaks another version of the protocol."""


class NonFinite(ProtocolError):
    """Hidden states contain NaN or infinity."""


class OutOfOrder(ProtocolError):
    """The sequence number or start position of a step does not follow from the session's state."""


class AuthenticationError(SplitError):
    """A peer, signature or ciphertext cannot be trusted."""


class CertificateError(AuthenticationError):
    """A certificate or roster is damaged, of another fleet or role, outside its validity, revoked or outdated."""

    #: The member that a certificate names and its Ed25519 public key, if the operator signed it; else None.
    member: str | None = None
    sign_key: bytes | None = None


class NeedEmbeddings(SplitError):
    """The worker lacks the embeddings that a step of an image needs; the device sends them again."""


# --- the queue and its sessions ----------------------------------------------------------------------------


class BrokerUnreachable(SplitError):
    """The broker did not answer in time."""


class NoWorker(SplitError):
    """No worker serves this body of this model; `served` says what workers serve."""

    def __init__(self, message: str, served: str = "") -> None:
        super().__init__(message)
        self.served = served


class Busy(SplitError):
    """Every worker of this model is full, or this machine is; try again after `retry_after` seconds."""

    retry_after: float

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SessionLost(SplitError):
    """The worker that held the session is gone, or refused to continue it."""


class WorkerGone(SessionLost):
    """The worker that held the session died, left or fell silent.

    Args:
        held: number of this device's sessions that had a step at the worker.
    """

    def __init__(self, message: str, held: int = 1) -> None:
        super().__init__(message)
        self.held = held


class WorkerSlow(SessionLost):
    """The worker that holds the session did not answer in time, and there is another one."""


class StepFailed(SessionLost):
    """The worker failed at a step, and lost the session."""


class HistoryLost(SplitError):
    """A session was lost, and the states needed to rebuild it were not kept."""


class Evicted(SplitError):
    """The worker no longer has what it kept of the session; the device sends it again."""


class WorkerFailed(SplitError):
    """A worker can no longer compute."""


class MeasurementTimeout(SplitError):
    """A measurement took longer than it may."""


# --- jobs --------------------------------------------------------------------------------------------------


class JobsError(SplitError):
    """An operation on a job, or on the store of jobs, is not possible."""


class UnknownJob(JobsError):
    """The store has no job with this id."""


class StoreLocked(JobsError):
    """The store of jobs is sealed under another key, or was damaged."""

    exit_code = 2


class AgentError(SplitError):
    """The agent already runs, does not run, or did not obey a command."""

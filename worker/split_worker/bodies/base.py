"""The interface of a body: all that the worker and its compute loop know about what they serve.

A request passes through `begin`, `launch` and `reply`, which the compute loop calls in this order on its thread.
The loop decides which requests share a forward. Only the body knows what its runs and a session's state hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch

from split_common.engine.sequences import KVSequence, KVStore, Run
from split_common.protocol import payloads


class SessionState(Protocol):
    """What a body keeps of a session between steps. Used by the compute loop's thread."""

    @property
    def holds_memory(self) -> bool:
        """Whether `free` would free KV memory."""

    @property
    def sequences(self) -> Sequence[KVSequence]:
        """What it holds in KV memory. Any thread may read it."""

    def fork(self) -> SessionState:
        """Returns a copy for another session of the same member. Raises Busy if that would have too many rows."""

    def commit(self) -> None:
        """Called when the step that was begun last has been answered."""

    def undo(self) -> None:
        """Reverts the step that was begun last, because it is refused and may come again."""

    def free(self) -> None:
        """Frees all memory."""


class Forward(Protocol):
    """A forward that was launched. On CUDA it runs while the host does other work."""

    def wait(self) -> list[torch.Tensor]:
        """Waits for the output, and returns that of each run, on the host."""


_State = TypeVar("_State", bound=SessionState)
_Run = TypeVar("_Run", bound=Run)


class Body(Protocol[_State, _Run]):
    """A loaded body: layers of a language model, or blocks of a denoiser."""

    #: The device that takes its inputs.
    device: torch.device
    #: The dtype that it computes in.
    dtype: torch.dtype
    #: Bytes of its weights.
    parameter_bytes: int
    #: Whether a forward that was launched runs while the host does other work.
    asynchronous: bool
    #: Whether prefill may be computed in chunks.
    divisible: bool
    #: Capabilities of `protocol/payloads.py` that do not hold for this body.
    lacks: frozenset[str]
    #: Seconds that the first forward may take before the worker counts as hung.
    first_turn: float

    @property
    def store(self) -> KVStore | None:
        """The sessions' KV memory; None if sessions take none."""

    def new_state(self, member: str = "") -> _State:
        """The state of a new session of a member. Called on any thread."""

    def begin(self, state: _State, request: payloads.AnyRequest, data: memoryview) -> Sequence[_Run]:
        """Checks a request, and prepares the session for it.

        Args:
            state: the session's.
            request: any but Fork and Close, which the worker handles itself.
            data: the bytes of the request's tensors.

        Returns:
            What is to be computed; empty if the request needs no forward.

        Raises:
            Malformed: the request does not fit the body or the session.
            Oversized: the request or its answer is too large.
            NonFinite: its tensors hold NaN or infinity.
            PromptTooLong: a row would exceed the model's positions or the KV memory.
            Busy: the session's member has too many rows.
            NeedEmbeddings: embeddings or earlier parts that it builds on are not held.
            Evicted: the session's state cannot be taken back to where the request begins.
        """

    def launch(self, runs: Sequence[_Run]) -> Forward:
        """Starts a forward over the runs of several sessions. If that fails, the sessions are unchanged."""

    def reply(
        self, state: _State, request: payloads.AnyRequest, output: torch.Tensor
    ) -> tuple[payloads.AnyReply, memoryview | bytes]:
        """The answer to a request, and the bytes of its tensors.

        Args:
            state: the session's.
            request: the request.
            output: the outputs of its runs, concatenated; empty if there were none.

        Raises:
            NonFinite: the output holds NaN or infinity.
            NeedEmbeddings: the output that is asked for is not held.
            Malformed: it ends before the bytes that are asked for.
        """

    def memory(self) -> dict[str, float]:
        """How much memory sessions may take and do take, by the names of `Worker.facts`."""

    def facts(self) -> dict[str, Any]:
        """What `worker --json` reports about this kind of body."""

    def describe(self, layers: str) -> list[str]:
        """The same as text: a phrase that continues "worker NAME serves MODEL", and further lines."""


#: A body of any kind. The compute loop passes a body only states and runs that the same body has made.
AnyBody = Body[Any, Any]

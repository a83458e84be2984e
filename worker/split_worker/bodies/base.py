"""The interface of a body: all that the worker and its compute loop know of what they serve.

A request passes through `begin`, `launch` and `reply`, called in this order on the thread that computes. The loop
decides which requests share a forward; only the body knows what is in its runs and in a session's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch

from split_common.engine.sequences import KVStore, Run
from split_common.protocol import payloads


class SessionState(Protocol):
    """What a body keeps of a session from one step to the next. Used by the thread that computes."""

    @property
    def holds_memory(self) -> bool:
        """Whether `free` would give KV memory back."""

    def fork(self) -> SessionState:
        """Returns a copy for another session."""

    def commit(self) -> None:
        """The step that was begun last is answered."""

    def undo(self) -> None:
        """The step that was begun last is refused, and may come again: its changes are undone."""

    def free(self) -> None:
        """Gives all memory back."""


class Forward(Protocol):
    """A forward that was launched. On CUDA it runs while the host does something else."""

    def wait(self) -> list[torch.Tensor]:
        """The output of each run, on the host."""


State = TypeVar("State", bound=SessionState)
R = TypeVar("R", bound=Run)


class Body(Protocol[State, R]):
    """A loaded body: layers of a language model, or blocks of a denoiser."""

    device: torch.device
    #: What it computes in.
    dtype: torch.dtype
    parameter_bytes: int
    #: Whether a forward that was launched runs while the host does something else.
    asynchronous: bool
    #: Whether prefill may go in chunks.
    divisible: bool
    #: Seconds that the first forward may take before the worker counts as hung.
    first_turn: float

    @property
    def store(self) -> KVStore | None:
        """The sessions' KV memory; None if sessions take none."""

    def new_state(self) -> State:
        """The state of a new session. Called on any thread."""

    def begin(self, state: State, request: payloads.AnyRequest, data: memoryview) -> Sequence[R]:
        """Checks a request, and makes the session ready for it.

        Args:
            state: the session's.
            request: any but a Fork or Close, which are the compute loop's.
            data: the request's tensors.

        Returns:
            What is to be computed; nothing if the request needs no forward.

        Raises:
            Malformed, Oversized, NonFinite, PromptTooLong, NeedEmbeddings: the request is refused.
        """

    def launch(self, runs: Sequence[R]) -> Forward:
        """Starts a forward over the runs of several sessions. If that fails, the sessions are as before."""

    def reply(
        self, state: State, request: payloads.AnyRequest, output: torch.Tensor
    ) -> tuple[payloads.AnyReply, memoryview | bytes]:
        """The answer to a request, and its tensors.

        Args:
            output: of the request's runs, one after the other; empty if there were none.

        Raises:
            NonFinite, NeedEmbeddings, Malformed: the request is refused.
        """

    def memory(self) -> dict[str, float]:
        """How much memory sessions may take and how much they take, by the name of the fact."""

    def facts(self) -> dict[str, Any]:
        """What `worker --json` reports of this kind of body."""

    def describe(self, layers: str) -> list[str]:
        """The same for people: a phrase that continues "worker NAME serves MODEL", and further lines."""


#: A body of any kind: the compute loop hands each its own states and runs back.
AnyBody = Body[Any, Any]

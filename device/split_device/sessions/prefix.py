"""What a session held at one time, with which later sessions may begin."""

from __future__ import annotations

from dataclasses import dataclass

from split_common.protocol import payloads
from split_device.sessions.history import History
from split_device.sessions.session import RemoteSession


@dataclass(frozen=True)
class SessionPrefix:
    """One row of tokens, without padding, that went through a body. Any thread may read it."""

    #: On its worker, which holds these tokens at least.
    remote: RemoteSession
    #: The states of these tokens, for other workers.
    history: History
    tokens: int
    #: The adapter that its keys and values are of; None without one.
    adapter: payloads.UseAdapter | None

    @property
    def is_live(self) -> bool:
        """Whether its worker may still hold it, and copy it."""
        return self.remote.can_be_copied

    def close(self) -> None:
        """Frees the session on its worker, without waiting."""
        self.remote.close()

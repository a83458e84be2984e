"""A device's channel to one worker, over which sessions run."""

from __future__ import annotations

from dataclasses import dataclass, field

from split_common.protocol.capabilities import OUTPUTS, PADDED_STEPS, TREES
from split_common.protocol.channel import CHANNEL_SESSIONS, Channel, EpochKeys
from split_common.transport import peer_name
from split_common.trust.keys import Roster


@dataclass
class WorkerChannel:
    """A channel to one worker. Session 0 is the channel itself."""

    worker: bytes
    number: int
    crypto: Channel
    control: EpochKeys
    #: Whether the worker has answered a request.
    answered: bool = False
    #: Whether the user was told that the worker does not pad its answers.
    said_unpadded: bool = False
    #: Sessions that may still be opened over it.
    sessions_left: int = field(default_factory=lambda: CHANNEL_SESSIONS)

    @property
    def worker_name(self) -> str:
        """The worker's name: that in its certificate, and what tells it from the member's other workers."""
        return peer_name(self.crypto.peer.name, self.worker)

    @property
    def pads(self) -> bool:
        """Whether the worker pads its answers to the size of steps that have room."""
        return {OUTPUTS, PADDED_STEPS} <= self.crypto.capabilities

    @property
    def takes_trees(self) -> bool:
        """Whether the worker takes several continuations at once."""
        # A step that is a tree is padded, and says which outputs it wants.
        return self.pads and TREES in self.crypto.capabilities

    @property
    def usable(self) -> bool:
        """Whether another session may be opened over it."""
        return self.sessions_left > 0 and not self.crypto.expired

    def trusted(self, roster: Roster) -> bool:
        """Whether the worker's certificate is still valid by this roster."""
        return self.crypto.trusted(roster)

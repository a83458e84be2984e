"""The bytes that are under way to one peer: sent, and not confirmed by its announcements.

What is under way cannot be overtaken any more. So while several members write to a peer, each has little under way,
and one that floods the peer delays nobody else's next message by more than that.
"""

from __future__ import annotations

import time
from collections import deque

from split_common.transport.zmq_link import CREDIT_STEP
from split_common.trust.shares import Usage

#: Bytes that may be under way to a peer, before one message more.
WINDOW = 64 * 1024 * 1024

#: Bytes of one sender that may be, if others have written to the peer lately: what a peer confirms at once.
SHARED_WINDOW = CREDIT_STEP

#: Seconds for which a sender counts as writing to the peer after its last message.
WRITING_FOR = 1.0


class UnderWay:
    """Counts them, by sender. Senders are members' names; the broker itself is the empty one, and has no share."""

    def __init__(self) -> None:
        #: Bytes of bodies sent over this connection, and how many of them the peer has confirmed.
        self.sent = 0
        self.received = 0
        #: Bytes that the peer had received before this connection; None until its first announcement over it.
        self.baseline: int | None = None
        # Messages that are not confirmed, oldest first, by sender and size; where the first of them ends; and their
        # bytes by sender.
        self._messages: deque[tuple[str, int]] = deque()
        self._confirmed = 0
        self._by_sender = Usage()
        # The sender of the last message, and that of the last one by another sender, with their times.
        self._last = self._other = "", float("-inf")

    @property
    def bytes(self) -> int:
        return max(0, self.sent - self.received)

    def allows(self, sender: str) -> bool:
        """Whether another message of a sender may be sent now."""
        if self.sent - self.received > WINDOW:
            return False
        return not sender or self._by_sender[sender] <= SHARED_WINDOW or self._is_alone(sender)

    def _is_alone(self, sender: str) -> bool:
        other = self._other if self._last[0] == sender else self._last
        return time.monotonic() - other[1] > WRITING_FOR

    def add(self, sender: str, size: int) -> None:
        """Counts a body of `size` bytes that is sent now."""
        self.sent += size
        if size:
            self._messages.append((sender, size))
            self._by_sender.add(sender, size)
        if sender:
            if sender != self._last[0]:
                self._other = self._last
            self._last = sender, time.monotonic()

    def undo(self, sender: str, size: int) -> None:
        """Undoes the last `add`: the socket did not accept the message. Nothing is left to undo after `lose`."""
        if size and self._messages:
            self.sent -= size
            self._messages.pop()
            self._by_sender.add(sender, -size)

    def confirm(self, received: int, unsent: int = 0) -> None:
        """Notes how many bytes the peer has received since it started.

        Args:
            received: what the peer says. More than was sent is not believed.
            unsent: bytes that have not left this machine, as the kernel counts them. They are not believed either.
        """
        if self.baseline is None:
            self.baseline = received
        self.received = min(received - self.baseline, self.sent - unsent)
        while self._messages and self._confirmed + self._messages[0][1] <= self.received:
            sender, size = self._messages.popleft()
            self._confirmed += size
            self._by_sender.add(sender, -size)

    def lose(self) -> None:
        """Begins a new connection: what was on its way over the old one is lost."""
        self.sent = self.received = self._confirmed = 0
        self.baseline = None
        self._messages.clear()
        self._by_sender = Usage()

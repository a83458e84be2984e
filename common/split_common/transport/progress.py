"""Whether a slow connection is still moving: large messages may keep heartbeats from getting through for long."""

from __future__ import annotations

from split_common.protocol import headers
from split_common.transport import tcp

#: Bytes that have to move until a connection counts as moving: more than a heartbeat, less than a packet.
LEAST_PROGRESS = 1024

#: Bytes without a whole message that a peer may send: two frames of the largest size.
UNFINISHED_BYTES = 2 * headers.MAX_FRAME

#: Bytes that CURVE adds to a frame: a command's name, a nonce, a tag and flags (RFC 26).
CURVE_OVERHEAD = 33


def wire_size(size: int, overhead: int = CURVE_OVERHEAD) -> int:
    """Bytes of a frame of `size` bytes as ZMTP 3 sends it: with a flag, and its size in 1 or 8 bytes."""
    size += overhead
    return size + (2 if size < 256 else 9)


class Progress:
    """What a peer's kernel knows of its connection to the broker, with CURVE. Not thread-safe.

    Where bytes cannot be counted (ipc sockets, other systems than Linux), nothing ever moves.
    """

    def __init__(self) -> None:
        self._fd = self._inode = -1
        #: Bytes written to the connection so far, and before the last heartbeat.
        self._handed = self._heartbeat = 0
        self._seen = tcp.Traffic(0, 0)
        #: Bytes that had been read when the last whole message came.
        self._whole = 0

    def gave(self, *sizes: int, heartbeat: bool = False) -> None:
        """Counts a message that was written, by the sizes of its frames."""
        if heartbeat:
            self._heartbeat = self._handed
        self._handed += sum(map(wire_size, sizes))

    def took(self, fd: int) -> None:
        """Notes that a whole message came over the connection with this descriptor."""
        inode = tcp.inode(fd)
        traffic = tcp.traffic(fd, inode)
        if traffic is None:
            self.forget()
            return
        if (fd, inode) != (self._fd, self._inode):
            # What was written to an earlier connection does not count.
            self._handed = self._heartbeat = traffic.acknowledged
            self._fd, self._inode = fd, inode
        self._seen, self._whole = traffic, traffic.read

    def forget(self) -> None:
        """Forgets the connection: another one may have its descriptor."""
        self._fd = self._inode = -1

    def moves(self) -> bool:
        """Whether bytes have moved since the last look, so that a heartbeat or its answer may still be on its way.

        What the broker's kernel takes counts only while the last heartbeat is behind it: a broker that hangs has a
        kernel, too. What comes counts up to the size of one message.
        """
        traffic = tcp.traffic(self._fd, self._inode) if self._fd >= 0 else None
        if traffic is None:
            self.forget()
            return False
        known, up, down = self._seen, False, False
        if traffic.acknowledged - known.acknowledged >= LEAST_PROGRESS:
            up = known.acknowledged < self._heartbeat - LEAST_PROGRESS
        if traffic.read - known.read >= LEAST_PROGRESS:
            down = traffic.read - self._whole <= UNFINISHED_BYTES
        self._seen = traffic
        return up or down

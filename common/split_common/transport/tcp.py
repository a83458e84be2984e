"""What the kernel knows of a connection, and how to end one whose socket belongs to libzmq.

libzmq reads and closes its connections on a thread of its own, and has no call that ends a single one. So each
function here works on a duplicate of the descriptor, and only if that is still the same socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Iterator
from typing import NamedTuple

#: Where `bytes_acked` and `bytes_received` lie in Linux' `struct tcp_info`, which a kernel only ever extends.
_COUNTS = struct.Struct("=QQ")
_COUNTS_AT = 120

#: Whether bytes can be counted here: the fields above exist since Linux 4.1.
COUNTED = hasattr(socket, "TCP_INFO") and os.uname().sysname == "Linux"


class Traffic(NamedTuple):
    """Bytes of a TCP connection since it was made, CURVE and ZMTP included."""

    #: Bytes from the peer that libzmq has read.
    read: int
    #: Bytes for the peer that its kernel has acknowledged.
    acknowledged: int


def inode(fd: int) -> int:
    """The number that tells a socket from a later one with the same descriptor; 0 if there is none."""
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return 0


def traffic(fd: int, expected: int) -> Traffic | None:
    """Counts a connection's bytes. None if it is not the expected socket any more, or not TCP on Linux.

    Args:
        fd: the socket's descriptor.
        expected: the socket's `inode`.
    """
    if not COUNTED:
        return None
    with _duplicate(fd, expected) as sock:
        if sock is None or sock.family == socket.AF_UNIX:
            return None
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _COUNTS_AT + _COUNTS.size)
        if len(info) < _COUNTS_AT + _COUNTS.size:
            return None
        acknowledged, received = _COUNTS.unpack_from(info, _COUNTS_AT)
        unread = int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), "little")
        return Traffic(received - unread, acknowledged)


def shut(fd: int, expected: int) -> bool:
    """Ends a connection as if the network had: libzmq then frees what it holds. False if it has already ended."""
    with _duplicate(fd, expected) as sock:
        if sock is None:
            return False
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        return True


@contextlib.contextmanager
def _duplicate(fd: int, expected: int) -> Iterator[socket.socket | None]:
    """The socket under a descriptor of its own; None if it is another one than expected, or fails meanwhile."""
    try:
        sock = socket.socket(fileno=os.dup(fd))
    except OSError:
        yield None
        return
    with sock, contextlib.suppress(OSError):
        yield sock if inode(sock.fileno()) == expected else None

"""Who may connect to the broker: members with their keys over TCP, processes of this user over an ipc socket."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections import Counter
from pathlib import Path

import zmq
import zmq.utils.z85
from zmq.auth.thread import ThreadAuthenticator

from split_common.errors import AuthenticationError, ConfigError, Malformed
from split_common.protocol.headers import Announce
from split_common.transport.supervised import count_dropped
from split_common.transport.zmq_link import curve_z85
from split_common.trust.fleet import Fleet


class Authentication:
    """Which member a peer is.

    Over TCP it proves this with CurveZMQ (RFC 26), once `secure` has been called. On an ipc socket, which its
    directory's permissions guard, its announcement is believed.

    Args:
        fleet: its members may connect.
        counters: count connections that are refused.
    """

    def __init__(self, fleet: Fleet, counters: Counter[str]) -> None:
        self._fleet = fleet
        self._counters = counters
        self._curve: ThreadAuthenticator | None = None

    def secure(self, context: zmq.Context[zmq.Socket[bytes]], sock: zmq.Socket[bytes]) -> None:
        """Makes a socket that is not bound yet accept members' CURVE keys alone. Starts pyzmq's thread for that.

        Raises:
            KeysError: the broker's own key is not here.
        """
        self._curve = ThreadAuthenticator(context)
        self._curve.start()
        self._curve.configure_curve_callback("*", credentials_provider=self)
        _, secret = curve_z85(self._fleet.identity("broker"))
        sock.curve_server = True
        sock.curve_secretkey = secret

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether a CURVE key (Z85) may connect. The thread that answers ZAP's requests (RFC 27) calls this."""
        member = self._fleet.roster().by_curve_key(zmq.utils.z85.decode(key))
        accepted = member is not None and not member.revoked
        if not accepted:
            count_dropped(self._counters, AuthenticationError("a connection whose key is not in the roster"))
        return accepted

    def member(self, envelope: zmq.Frame, announcement: Announce) -> str:
        """The name of the member that sent an announcement.

        Args:
            envelope: the message's first frame, which knows the connection's CURVE key.
            announcement: names the member and its role.

        Raises:
            Malformed: the member is unknown or revoked, or has another name or role.
        """
        roster = self._fleet.roster()
        if self._curve is None:
            member = roster.by_name(announcement.member)
        else:
            member = roster.by_curve_key(zmq.utils.z85.decode(str(envelope.get("User-Id"))))
        if (
            member is None
            or member.revoked
            or (member.role, member.name) != (announcement.role, announcement.member)
        ):
            raise Malformed("an announcement that its sender's key does not allow")
        return member.name

    def stop(self) -> None:
        if self._curve is not None:
            self._curve.stop()


def claim(path: Path) -> None:
    """Prepares the path of an ipc socket.

    Raises:
        ConfigError: its directory cannot be made or is open to other users, or a broker already listens there.
    """
    directory = path.parent
    try:
        directory.mkdir(parents=True, mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be made: {error.strerror}") from None
    found = directory.stat()
    if stat.S_IMODE(found.st_mode) & 0o077 or found.st_uid != os.getuid():
        raise ConfigError(f"{directory} is open to other users: `chmod 700` it, or bind to a directory of your own")
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        # A second bind would silently take the path away from the first.
        probe.connect(str(path))
        raise ConfigError(f"cannot listen on ipc://{path}: a broker is there")

"""Who may connect to the broker: members with their keys over TCP, processes of this user over an ipc socket.

An announcement also shows the member's certificate, which must hold now and, for a worker, for its service.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

import zmq
import zmq.utils.z85
from zmq.auth.thread import ThreadAuthenticator

from split_common.errors import AuthenticationError, CertificateError, ConfigError, Malformed
from split_common.protocol.headers import Announce, Service
from split_common.transport.peer_id import mark_of, member_mark
from split_common.transport.supervised import count_dropped
from split_common.transport.zmq_socket import curve_z85
from split_common.trust.fleet import Fleet
from split_common.trust.keys import MAX_SIGNED, Certificate, Member, ModelScope, check_certificate, open_signed

#: Seconds for which devices are told of a worker that is not let in. It tries again sooner.
TURNED_AWAY = 10.0

#: Certificates whose signature is not verified again with each heartbeat.
KNOWN_CERTIFICATES = 4096

#: Names the broker's socket in ZAP's requests (RFC 27).
ZAP_DOMAIN = "lambda-split"

#: Seconds during which a member that tried to fill the broker's memory may make no connection.
BARRED = 30.0


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
        # Members that may not connect for a while, and until when, by `time.monotonic`.
        self._barred: dict[str, float] = {}
        self._curve: ThreadAuthenticator | None = None
        # Workers, by member, whose certificate does not hold: their service, why, and when it was shown last.
        self._turned_away: dict[str, tuple[Service, str, float]] = {}
        self._open = lru_cache(KNOWN_CERTIFICATES)(self._open_certificate)

    def secure(self, context: zmq.Context[zmq.Socket[bytes]], sock: zmq.Socket[bytes]) -> None:
        """Makes a socket that is not bound yet accept members' CURVE keys alone. Starts pyzmq's thread for that.

        Raises:
            KeysError: the broker's own key is not here.
        """
        self._curve = ThreadAuthenticator(context)
        self._curve.start()
        self._curve.configure_curve_callback(ZAP_DOMAIN, credentials_provider=self)
        _, secret = curve_z85(self._fleet.identity("broker"))
        sock.zap_domain = ZAP_DOMAIN.encode()
        # Without this, libzmq lets everybody in once nothing answers ZAP's requests.
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        sock.curve_server = True
        sock.curve_secretkey = secret

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether a CURVE key (Z85) may connect. The thread that answers ZAP's requests (RFC 27) calls this."""
        member = self._fleet.roster().by_curve_key(zmq.utils.z85.decode(key))
        accepted = (
            member is not None and not member.revoked and time.monotonic() >= self._barred.get(member.name, 0.0)
        )
        if not accepted:
            count_dropped(self._counters, AuthenticationError("a connection whose key may not connect"))
        return accepted

    def owner(self, envelope: zmq.Frame) -> str:
        """The name of the member whose CURVE key a message's connection has; empty over ipc, where it has none."""
        if self._curve is None:
            return ""
        member = self._keyed(str(envelope.get("User-Id")))
        return member.name if member is not None else ""

    def _keyed(self, key: str) -> Member | None:
        return self._fleet.roster().by_curve_key(zmq.utils.z85.decode(key))

    def member(self, envelope: zmq.Frame, announcement: Announce) -> str:
        """The name of the member that sent an announcement.

        Args:
            envelope: the message's first frame, which knows the connection's CURVE key.
            announcement: names the member and its role.

        Raises:
            Malformed: the member is unknown or revoked, or has another name or role, or the peer's id bears another
                member's mark, by which workers count set-ups.
        """
        if self._curve is None:
            member = self._fleet.roster().by_name(announcement.member)
        else:
            member = self._keyed(str(envelope.get("User-Id")))
        if (
            member is None
            or member.revoked
            or (member.role, member.name) != (announcement.role, announcement.member)
            or mark_of(announcement.sender) != member_mark(member.name)
        ):
            raise Malformed("an announcement that its sender's key does not allow")
        return member.name

    def certify(self, announcement: Announce, certificate: memoryview) -> bool:
        """Checks the certificate that a member shows with an announcement that `member` has accepted.

        Args:
            announcement: names the member, its role and a worker's service.
            certificate: as the operator signed it; empty from peers of older versions, which show none.

        Returns:
            Whether there is one.

        Raises:
            CertificateError: it is damaged, another member's, not valid now, or does not cover the service.
            Malformed: the service has no layers.
        """
        if not certificate:
            return False
        service = announcement.service if announcement.role == "worker" else None
        if service is not None and service.first >= service.last:
            raise Malformed(f"a service of the layers {service.first}:{service.last}")
        scope = ModelScope(service.root, service.first, service.last) if service is not None else None
        try:
            if len(certificate) > MAX_SIGNED["certificate"]:
                raise CertificateError(f"{announcement.member!r} shows a certificate of {len(certificate)} bytes")
            opened = self._open(bytes(certificate))
            if opened.name != announcement.member:
                raise CertificateError(f"{announcement.member!r} shows the certificate of {opened.name!r}")
            check_certificate(opened, roster=self._fleet.roster(), role=announcement.role, scope=scope)
        except CertificateError as error:
            if service is not None:
                self._turned_away[announcement.member] = service, str(error), time.monotonic()
            raise
        return True

    def turned_away(self, service: Service, now: float) -> list[str]:
        """Why workers that offered this service lately were not let in, for devices that miss them.

        Args:
            service: that they offered.
            now: the time, by `time.monotonic`.
        """
        for member in [one for one, (_, _, shown) in self._turned_away.items() if now - shown > TURNED_AWAY]:
            del self._turned_away[member]
        return [why for offered, why, _ in self._turned_away.values() if offered == service]

    def _open_certificate(self, certificate: bytes) -> Certificate:
        return open_signed("certificate", Certificate, certificate, self._fleet.operator_key)

    def bar(self, member: str) -> None:
        """Refuses a member's new connections for `BARRED` seconds. Over ipc they are not refused."""
        self._barred[member] = time.monotonic() + BARRED

    def stop(self) -> None:
        if self._curve is not None:
            self._curve.stop()


def claim(path: Path) -> None:
    """Checks the path of an ipc socket.

    Raises:
        ConfigError: its directory is not there or is open to other users, or a broker already listens there.
    """
    directory = path.parent
    try:
        # What is not there is not made: root would make a mistyped path anywhere.
        found = directory.stat()
    except OSError as error:
        raise ConfigError(f"cannot listen on ipc://{path}: {directory}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"cannot listen on ipc://{path}: {directory} is not a directory")
    if stat.S_IMODE(found.st_mode) & 0o077 or found.st_uid != os.getuid():
        raise ConfigError(f"{directory} is open to other users: `chmod 700` it, or bind to a directory of your own")
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        # A second bind would silently take the path away from the first.
        probe.connect(str(path))
        raise ConfigError(f"cannot listen on ipc://{path}: a broker is there")

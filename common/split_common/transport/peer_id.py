"""Ids of peers: 4 bytes that mark the member, and 4 random ones."""

from __future__ import annotations

import hashlib
import os


def member_mark(member: str) -> bytes:
    """The first 4 bytes of the ids of all peers of a member: access rules tell by them whose a peer is."""
    return hashlib.blake2b(member.encode(), digest_size=4).digest()


def new_peer_id(member: str) -> bytes:
    """Identifies one run of a device or worker (8 bytes)."""
    return member_mark(member) + os.urandom(4)

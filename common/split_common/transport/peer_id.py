"""Ids of peers: 4 bytes that stand for the member, and 4 random ones."""

from __future__ import annotations

import hashlib
import os


def member_mark(member: str) -> bytes:
    """The first 4 bytes of the ids of all peers of a member, by which access rules recognize it."""
    return hashlib.blake2b(member.encode(), digest_size=4).digest()


def mark_of(peer: bytes) -> bytes:
    """The mark of the member that a peer's id says it is of."""
    return peer[:4]


def peer_name(member: str, peer: bytes) -> str:
    """The name of one run of a member's process, for people: the member, and what is random in the peer's id."""
    return f"{member}/{peer[4:].hex()}"


def new_peer_id(member: str) -> bytes:
    """A new id (8 bytes), for one run of a device or worker."""
    return member_mark(member) + os.urandom(4)

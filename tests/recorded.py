"""Golden samples: where they lie, how they are compared, and the fleet that they belong to."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from nacl.public import PrivateKey
from nacl.signing import SigningKey

from split_common.protocol import headers
from split_common.trust.keys import Certificate, Identity, Member, ModelScope, Role, Roster, seal
from split_common.trust.manifest import Manifest

GOLDEN = Path(__file__).parent / "golden"

#: Whether missing samples are added.
ADD = bool(os.environ.get("LAMBDA_SPLIT_ADD_GOLDEN"))


def check_bytes(name: str, samples: dict[str, bytes]) -> dict[str, bytes]:
    """Compares samples with those in a file; returns the latter."""
    path = GOLDEN / f"{name}.hex"
    golden = read_bytes(path) if path.exists() else {}
    if ADD and samples.keys() - golden.keys():
        golden = samples | golden
        path.write_text("".join(map(listing, golden, golden.values())))
    assert {key: listing(key, value) for key, value in samples.items()} == {
        key: listing(key, value) for key, value in golden.items()
    }
    return golden


def listing(name: str, data: bytes) -> str:
    lines = (data[begin : begin + 32].hex() for begin in range(0, len(data), 32))
    return "\n".join([f"{name}:", *(f"  {line}" for line in lines)]) + "\n"


def read_bytes(path: Path) -> dict[str, bytes]:
    samples: dict[str, bytes] = {}
    name = ""
    for line in path.read_text().splitlines():
        if line.startswith("  "):
            samples[name] += bytes.fromhex(line)
        else:
            name = line.removesuffix(":")
            samples[name] = b""
    return samples


def check_text(name: str, text: str) -> str:
    """Compares a text with that in a file."""
    path = GOLDEN / name
    if ADD and not path.exists():
        path.write_text(text)
    golden = path.read_text()
    assert text.splitlines() == golden.splitlines()
    return golden


# --- the fleet -------------------------------------------------------------------------------------------------

ROOT = bytes(range(32))
DEVICE_ID, WORKER_ID = b"device-A", b"worker-B"
SERVICE = headers.Service(ROOT, 2, 28)
REQUEST = headers.Relay(WORKER_ID, DEVICE_ID, headers.RelayKind.REQUEST, 5, 6, 7, 8, 9)
REPLY = headers.Relay(DEVICE_ID, WORKER_ID, headers.RelayKind.REPLY, 5, 6, 7, 8, 90_000)
KEY = bytes(range(100, 132))
SESSION_KEY = bytes(range(0xA0, 0xB0))
KEYED_REQUEST = msgspec.structs.replace(REQUEST, session=SESSION_KEY)
KEYED_REPLY = msgspec.structs.replace(REPLY, session=SESSION_KEY)

OPERATOR = SigningKey(b"operator" * 4)
OPERATOR_KEY = bytes(OPERATOR.verify_key)
SCOPE = ModelScope(SERVICE.root, SERVICE.first, SERVICE.last)


def identity(role: Role, models: tuple[ModelScope, ...] = ()) -> Identity:
    name = f"{role}-1"
    signing_key, curve = SigningKey(role.encode().ljust(32, b"s")), PrivateKey(role.encode().ljust(32, b"c"))
    certificate = Certificate(
        role, name, bytes(signing_key.verify_key), bytes(curve.public_key), 1_700_000_000, 4_000_000_000, models
    )
    sealed = seal("certificate", certificate, OPERATOR)
    return Identity(sealed, certificate, signing_key, bytes(curve), OPERATOR_KEY)


BROKER, DEVICE, WORKER = identity("broker"), identity("device"), identity("worker", (SCOPE,))
ROSTER = Roster(
    4,
    1_750_000_000,
    tuple(
        Member(c.name, c.role, c.sign_key, c.curve_key, c.role == "broker")
        for c in (member.certificate for member in (BROKER, DEVICE, WORKER))
    ),
)
MANIFEST = Manifest("org/model", KEY, {"model.embed.weight": ROOT, "lm_head.weight": bytes(32)})

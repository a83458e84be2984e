"""How a device reaches the workers, and how long it waits for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from split_common.errors import ConfigError
from split_common.transport.address import DEFAULT_BROKER
from split_device.sessions.notices import OnNotice

#: Seconds to wait for the broker.
TIMEOUT = 10.0

#: Seconds that a device waits while all workers are full, before it raises `Busy`.
PATIENCE = 60.0

#: Seconds without a reply after which a device looks for a faster worker. A full worker answers late, too.
STEP_TIMEOUT = 60.0

#: Bytes of a session's hidden states that stay in memory; older ones are spilled.
HISTORY_MEMORY = 64 * 1024 * 1024

#: Whether the sizes of decoding steps do not follow their tokens.
PAD_STEPS = True

#: Longest time to wait, in seconds: three years. The system takes no timeout of centuries.
MAX_SECONDS = 1e8


@dataclass(frozen=True)
class Connection:
    """How a device reaches the workers.

    Raises:
        ConfigError: a number is not finite, negative, or larger than `MAX_SECONDS` or 63 bits allow.

    Args:
        broker: the queue: `zmq://HOST:PORT`, `tcp://HOST:PORT` or `ipc://PATH` of a broker, or an address of Redis
            or Valkey.
        keys: the fleet's directory; by default $LAMBDA_SPLIT_KEYS, the user's configuration, or a fleet for this
            machine's loopback alone.
        member: this device's name in the fleet; needed when the directory holds several devices' keys.
        timeout: seconds to wait for the broker.
        patience: seconds to wait while all workers are full, or none is left to take over.
        step_timeout: seconds without an answer after which a worker counts as too slow, if there is another one.
        history_memory: bytes of the hidden states that each session of a language model keeps in memory, to resume
            on another worker; the rest goes to an encrypted temporary file (in $TMPDIR).
        pad_steps: whether the sizes of decoding steps do not follow their tokens, so that the queue cannot tell
            how many were drafted, accepted or forced by a grammar. It costs bytes, and no tokens.
        on_notice: takes one line of text when a worker is lost, waited for or found, on any thread; None logs it as
            a warning.
        wait_for_first: whether to be patient also if no worker of any model is there, which else is an error at
            once.
    """

    broker: str = DEFAULT_BROKER
    keys: str | Path | None = None
    member: str | None = None
    timeout: float = TIMEOUT
    patience: float = PATIENCE
    step_timeout: float = STEP_TIMEOUT
    history_memory: int = HISTORY_MEMORY
    pad_steps: bool = PAD_STEPS
    on_notice: OnNotice | None = field(default=None, compare=False, repr=False)
    wait_for_first: bool = False

    def __post_init__(self) -> None:
        seconds = dict.fromkeys(("timeout", "patience", "step_timeout"), MAX_SECONDS)
        for name, most in {**seconds, "history_memory": 2**63 - 1}.items():
            if not 0 <= (value := getattr(self, name)) <= most:
                raise ConfigError(f"invalid {name} {value!r}: expected a number from 0 to {most:g}")

    @classmethod
    def of(cls, connection: Connection | None, fields: dict[str, Any], unused: Collection[str] = ()) -> Connection:
        """A connection, the default one if None, with some fields replaced.

        Raises:
            TypeError: a field is unknown, or among those that the caller has no use for.
        """
        if wrong := sorted(fields.keys() & set(unused)):
            raise TypeError(f"unexpected keyword argument {wrong[0]!r}")
        return dataclasses.replace(connection or cls(), **fields)

"""Common base of language models and denoisers: joining the queue, and refusals."""

from __future__ import annotations

import shlex
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from split_common.errors import UnsupportedFeature
from split_common.models.codecs import CODECS, EXACT
from split_common.models.codecs.base import Codec
from split_common.models.split import Split
from split_common.protocol import headers, payloads
from split_common.transport import Transport, connect
from split_common.transport.address import DEFAULT_BROKER, masked
from split_common.trust.fleet import Fleet, load_fleet
from split_common.trust.keys import Identity
from split_common.trust.manifest import Manifest
from split_device.sessions.client import Client
from split_device.sessions.connection import Connection
from split_device.sessions.timings import Timings


@dataclass(frozen=True)
class Endpoint:
    """A device of a fleet and its transport. Found before the model is loaded, so that mistakes show early."""

    fleet: Fleet
    identity: Identity
    transport: Transport
    connection: Connection

    @classmethod
    def find(cls, connection: Connection) -> Endpoint:
        """Loads the fleet and this device's keys.

        Raises:
            KeysError: they are missing or invalid.
            ConfigError: the broker's address is invalid.
        """
        fleet = load_fleet(Path(connection.keys) if connection.keys is not None else None)
        identity = fleet.identity("device", connection.member)
        return cls(fleet, identity, connect(connection.broker, fleet, identity), connection)

    def join(
        self,
        manifest: Manifest,
        split: Split,
        dtype: payloads.Dtype,
        options: str,
        codec: Codec = CODECS[EXACT],
        unit: str = "layers",
    ) -> Client:
        """Joins the queue to find workers of a body.

        Args:
            options: of the command that starts a worker of the body, for messages, with a blank before each.
            codec: encodes the hidden states of a language model.
            unit: what the body's range counts: see `Client`.

        Raises:
            BrokerUnreachable: the broker did not answer in time.
        """
        service = headers.Service(manifest.root, split.first, split.last)
        client = Client(
            self.transport,
            self.fleet,
            self.identity,
            service,
            manifest.name,
            dtype,
            timeout=self.connection.timeout,
            patience=self.connection.patience,
            step_timeout=self.connection.step_timeout,
            command=f"lambda-split worker{options}{self._queue_option()}",
            on_notice=self.connection.on_notice,
            wait_for_first=self.connection.wait_for_first,
            codec=codec,
            pad_steps=self.connection.pad_steps,
            unit=unit,
        )
        client.start()
        return client

    def _queue_option(self) -> str:
        """The option with which a worker joins this queue; none for the default one."""
        address = self.connection.broker
        return "" if address == DEFAULT_BROKER else f" --broker {shlex.quote(masked(address))}"


class ConnectedModel:
    """A model that has joined the queue: `close` it, or use it as a context manager, to leave."""

    split: Split
    _client: Client

    def _set_client(self, client: Client, split: Split) -> None:
        self._client = client
        self.split = split
        weakref.finalize(self, client.close)

    @property
    def timings(self) -> Timings:
        """How long the stages of this model's steps took. Any thread may use it."""
        return self._client.timings

    @property
    def traffic(self) -> Counter[str]:
        """Messages and bytes sent and received, and messages refused by type of error, since the start."""
        transport: Any = self._client.transport
        # Other threads count meanwhile, so each counter is copied in one operation.
        return Counter(dict(transport.counters)) + Counter(dict(self._client.counters))

    def close(self) -> None:
        """Leaves the queue; workers free this device's sessions. The model cannot be used afterwards."""
        self._client.close()

    def check_process(self) -> None:
        """Raises ForkedProcess in a process that was forked since the model was loaded, as each call does."""
        self._client.check_process()

    def save_pretrained(self, *_args: Any, **_options: Any) -> Any:
        """Refused: this process holds only a part of the model."""
        raise UnsupportedFeature("a split model holds only a part of the weights; save the original checkpoint")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def refuse_gradients(states: torch.Tensor) -> None:
    """Raises UnsupportedFeature for states that require gradients."""
    if states.requires_grad:
        raise UnsupportedFeature("gradients do not pass through the worker: use torch.no_grad()")

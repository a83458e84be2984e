"""The `lambda-split broker` command."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from split_common.cli.options import JsonOption, KeysOption
from split_common.system.console import emit_json, stderr
from split_common.system.signals import catch_sigterm, wait_until_set
from split_common.transport.address import DEFAULT_BROKER
from split_common.trust.fleet import load_fleet


def register(app: typer.Typer) -> None:
    """Adds the `broker` command to `app`."""
    app.command()(broker)


def broker(
    bind: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Where to listen: tcp://HOST:PORT (port * for a free one), zmq://HOST:PORT or ipc://PATH.",
        ),
    ] = DEFAULT_BROKER,
    keys: KeysOption = None,
    json: JsonOption = False,
) -> None:
    """Run the message queue between devices and workers, until SIGTERM or Ctrl-C.

    It routes encrypted messages and sees no text. It can be restarted at any time: sessions continue.
    """
    from split_broker.broker import Broker

    fleet = load_fleet(keys)
    running = Broker(bind, fleet)
    running.start()
    stop = catch_sigterm()
    try:
        if json:
            emit_json({"address": running.address, "pid": os.getpid()})
        else:
            whose = "this machine's own keys" if fleet.is_loopback else f"the keys in {fleet.path}"
            stderr.print(f"broker on {running.address}, with {whose}", soft_wrap=True)
        wait_until_set(stop)
    finally:
        running.stop()

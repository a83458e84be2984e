"""The `lambda-split broker` command."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from split_common.cli.options import JsonOption, KeysOption, parse_size
from split_common.errors import ConfigError
from split_common.system.console import emit_json, saying_stop, stderr
from split_common.system.process import allow_many_files
from split_common.system.signals import catch_sigterm, wait_until_set
from split_common.transport.address import DEFAULT_BROKER
from split_common.trust.fleet import load_fleet

#: What a broker needs for itself and the largest messages of a few peers, in bytes.
LEAST_MEMORY_LIMIT = 128 * 1024 * 1024


def register(app: typer.Typer) -> None:
    """Adds the `broker` command to `app`."""
    app.command()(broker)


def broker(
    bind: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            envvar="LAMBDA_SPLIT_BIND",
            help="Where to listen: tcp://HOST:PORT (port * for a free one), zmq://HOST:PORT or ipc://PATH.",
        ),
    ] = DEFAULT_BROKER,
    memory_limit: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Memory of this process above which it ends the connections that hold the most. Half of it is for "
            "messages that wait.",
        ),
    ] = "1536MiB",
    keys: KeysOption = None,
    json: JsonOption = False,
) -> None:
    """Run the message queue between devices and workers, until SIGTERM or Ctrl-C.

    It routes encrypted messages and sees no text. It can be restarted at any time: sessions continue.
    """
    from split_broker.broker import Broker

    limit = parse_size(memory_limit)
    if limit < LEAST_MEMORY_LIMIT:
        raise ConfigError(f"--memory-limit {memory_limit}: a broker needs at least {LEAST_MEMORY_LIMIT >> 20}MiB")
    fleet = load_fleet(keys)
    allow_many_files()
    running = Broker(bind, fleet, limit)
    running.start()
    stop = catch_sigterm()
    try:
        with saying_stop("sessions continue when a broker is back"):
            if json:
                emit_json({"address": running.address, "pid": os.getpid()})
            else:
                whose = "this machine's own keys" if fleet.is_loopback else f"the keys in {fleet.path}"
                stderr.print(f"broker on {running.address}, with {whose}", soft_wrap=True)
            wait_until_set(stop)
    finally:
        running.stop()

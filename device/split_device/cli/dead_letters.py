"""`lambda-split dead-letters`: steps that were given up."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from split_common.cli.options import JsonOption
from split_common.system.console import emit_json, stderr
from split_common.system.times import iso_time

if TYPE_CHECKING:
    from split_device.sessions.dead_letters import DeadLetter


def dead_letters(
    clear: Annotated[bool, typer.Option("--clear", help="Remove the records after showing them.")] = False,
    json: JsonOption = False,
) -> None:
    """Show this user's steps that were given up because workers failed or died while computing them.

    Neither their texts nor their hidden states are recorded.
    """
    import msgspec

    from split_device.sessions import dead_letters as letters
    from split_device.sessions.refusals import printable

    found = letters.read()
    if json:
        # `time`, in seconds since the epoch, is deprecated.
        listed = [msgspec.to_builtins(letter) | {"recorded_at": iso_time(letter.time)} for letter in found]
        emit_json({"dead_letters": listed})
    for letter in found if not json else ():
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.time))
        body = f"{letter.model} {letter.unit or 'layers'} {letter.layers}"
        print(
            f"{when} {_names(letter)}{body}: {letter.tokens} tokens of "
            f"{letter.rows} rows after {letter.cached}, at {', '.join(letter.workers)}: {printable(letter.reason)}"
        )
    if not found and not json:
        stderr.print("no step was given up")
    if clear:
        letters.clear()


def _names(letter: DeadLetter) -> str:
    return f"request {letter.request_id}, session {letter.session}: " if letter.request_id else ""

"""Grammars of constraints: checked in a process of their own, so that no schema stops or ends this one."""

from __future__ import annotations

import functools
import re
import signal
import subprocess

import msgspec

from split_common.errors import Busy, ConfigError, UnsupportedFeature
from split_device.generation.compilers import COMPILERS
from split_device.generation.structured import Source, StructuredOutputs

#: Most seconds of CPU time that a grammar takes to compile.
COMPILE_SECONDS = 0.5

#: Seconds after which the process that compiles counts as stuck, on a machine that is very busy.
STUCK_SECONDS = 60.0

#: Most grammars that are kept.
KEPT = 64

#: What the compiler says of what it cannot enforce, and what is said here.
_UNSUPPORTED = (
    (re.compile(r"Unimplemented keys: \[(.*)\]"), "JSON Schema's {} cannot be enforced"),
    (re.compile(r"Unknown format: (.*)"), "JSON Schema's format {} cannot be enforced"),
    (
        re.compile(r"(oneOf) constraints are not supported.*"),
        "{} cannot be enforced unless its schemas exclude each other",
    ),
    (
        re.compile(r".*(look-?arounds?|backreferences|lookarounds).* not supported.*"),
        "{} in an expression cannot be enforced",
    ),
)

#: Most characters of what the compiler says that are passed on.
_MAX_ERROR = 400


class _Checked(msgspec.Struct):
    grammar: str = ""
    error: str = ""


def grammar_of(structured: StructuredOutputs) -> str:
    """The grammar of a constraint, as llguidance has it. Takes up to a second, or as long as the machine is busy.

    Raises:
        ConfigError: the constraint is not one, no text fits it, or it takes too much time or memory to compile.
        UnsupportedFeature: a keyword of a schema, named in the message, cannot be enforced.
        Busy: this machine has no room for the process that compiles.
    """
    checked = _checked(structured.source())
    if not checked.error:
        return checked.grammar
    for pattern, message in _UNSUPPORTED:
        if found := pattern.fullmatch(checked.error):
            raise UnsupportedFeature(f"structured outputs: {message.format(found[1].replace(chr(34), ''))}")
    raise ConfigError(f"structured outputs: {checked.error}")


@functools.lru_cache(KEPT)
def _checked(source: Source) -> _Checked:
    """What the process that compiles says of a constraint. Raises Busy if it could not, which is not kept."""
    request = {"kind": source.kind, "text": source.text, "seconds": COMPILE_SECONDS}
    try:
        code, output = COMPILERS.run(msgspec.json.encode(request), STUCK_SECONDS)
    except subprocess.TimeoutExpired:
        raise Busy("structured outputs: the machine is too busy to compile the grammar") from None
    except OSError as error:
        raise Busy(f"structured outputs: no process can be started to compile: {error.strerror}") from None
    if code == -signal.SIGPROF:
        return _Checked(error=f"it takes longer than {COMPILE_SECONDS:g} s to compile")
    if code:
        return _Checked(error="it is too large or nested too deeply to compile")
    checked = msgspec.json.decode(output, type=_Checked)
    return msgspec.structs.replace(checked, error=" ".join(checked.error.split())[:_MAX_ERROR])

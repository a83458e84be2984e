"""What Redis' errors mean: a setting that is wrong, or a server that takes nothing for a while.

A wrong setting stays wrong: it is said at once, with what to do, and not tried again in a hurry. Everything else
may pass, and is tried again.
"""

from __future__ import annotations

import ssl
from typing import Final

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from redis.sentinel import MasterNotFoundError

from split_common.errors import BrokerUnreachable
from split_common.transport.address import ESCAPE

#: Environment variable with the password, if the address has none.
PASSWORD_VARIABLE = "LAMBDA_SPLIT_REDIS_PASSWORD"  # noqa: S105

#: What the server's memory being full means.
OUT_OF_MEMORY = "its memory is full (maxmemory): give it more, or look for keys that nobody needs"

#: What passes by itself, or once somebody looks after the server; by the first word of the error.
_PASSING: Final = {
    "MISCONF": "it cannot save its data and takes no changes until it can: look at its disk and its log",
    "OOM": OUT_OF_MEMORY,
    "READONLY": "it is a replica now",
    "LOADING": "it is still loading its data",
    "BUSY": "it is running a script",
    "NOREPLICAS": "it has too few replicas to take changes (min-replicas-to-write)",
    "MASTERDOWN": "it is a replica that has lost its master",
    "CLUSTERDOWN": "the cluster is down, or lacks some of its slots",
    "TRYAGAIN": "the cluster is moving slots",
}


class Unreachable(BrokerUnreachable):
    """The server does not answer at the moment, or takes no commands."""


class Refused(BrokerUnreachable):
    """The server refuses this user or this command: a setting is wrong. Trying again does not help."""


def failed(answer: object, shown: str = "the server") -> str:
    """The error message in a command's answer; empty if the command did not fail.

    A full memory is no more than a message here: what must be stored decides what that means.

    Args:
        answer: a server's, as `RedisConnections.run` returns it.
        shown: the server's address, for errors.

    Raises:
        Refused: the user lacks a permission.
        Unreachable: the server takes no such commands for the moment.
    """
    if not isinstance(answer, ResponseError):
        return ""
    if isinstance(answer, OutOfMemoryError):
        return f"{OUT_OF_MEMORY}: {answer}"
    raise_for(answer, shown)
    return str(answer)


def raise_for(error: ResponseError, shown: str = "the server") -> None:
    """Raises what an error means, if it does not concern a single command.

    Args:
        error: the server's.
        shown: the server's address, for the message.

    Raises:
        Refused, Unreachable: as `failed`.
    """
    if isinstance(error, NoPermissionError):
        raise Refused(f"{shown} denies its user a permission (see `lambda-split redis-acl`): {error}")
    code = error.status_code or str(error).partition(" ")[0]
    if isinstance(error, ReadOnlyError):
        code = "READONLY"
    if why := _PASSING.get(code):
        words = str(error) if str(error).startswith(code) else f"{code} {error}"
        raise Unreachable(f"{shown}: {why} ({words})")


def of_connecting(shown: str, error: Exception) -> BrokerUnreachable:
    """What it means that no connection could be made, or that one broke.

    Args:
        shown: the server's address.
        error: redis-py's, or the system's.
    """
    if isinstance(error, MovedError):
        return Refused(f"{shown} is a node of a cluster: write redis+cluster:// or rediss+cluster://")
    if "luster mode is not enabled" in str(error):
        return Refused(f"{shown} is not a cluster: write redis:// or rediss://")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, AuthenticationError | AuthorizationError):
            return Refused(
                f"{shown} does not accept this user name or password ({cause}): put them into the address, or the "
                f"password into ${PASSWORD_VARIABLE}; {ESCAPE}"
            )
        if isinstance(cause, ssl.SSLError):
            why = getattr(cause, "verify_message", "") or cause.reason or str(cause)
            kind = Refused if isinstance(cause, ssl.SSLCertVerificationError) else Unreachable
            return kind(f"no TLS connection to {shown}: {why} (is it a TLS port? ?ssl_ca_certs=FILE names the CA)")
        if isinstance(cause, MasterNotFoundError):
            # redis-py's own text has its connections' parameters.
            return Unreachable(f"no Sentinel of {shown} answers, or none knows a master of this name")
        cause = cause.__cause__ or cause.__context__
    return Unreachable(f"no answer from {shown}: {error}")

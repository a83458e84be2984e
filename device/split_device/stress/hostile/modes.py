"""The modes of a hostile member, by name. Nothing here imports a library: `--help` lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from split_common.errors import ConfigError
from split_device.stress.plan import TransportName, WorkloadKind

#: Transports over which most modes work.
_BOTH: tuple[TransportName, ...] = ("zmq", "redis")


@dataclass(frozen=True)
class Mode:
    """What a hostile member does."""

    #: For `--help`: a sentence without its subject.
    description: str
    #: The role of the certificate that the hostile member has.
    role: Literal["device", "worker"] = "device"
    transports: Sequence[TransportName] = _BOTH
    #: The kind of model whose workers it attacks.
    kind: WorkloadKind = "text"


MODES: dict[str, Mode] = {
    # hostile/connections.py
    "preauth": Mode("opens connections and sends frames before any key is checked", transports=("zmq",)),
    "multipart": Mode("sends multipart messages that never end", transports=("zmq",)),
    "credit": Mode("reads nothing, and claims to have received everything", transports=("zmq",)),
    "peers": Mode("joins as hundreds of peers that watch thousands of others"),
    # hostile/frames.py
    "garbage": Mode("sends damaged headers, oversized frames, and messages of the broker"),
    "senders": Mode("sends messages under other peers' ids"),
    "replays": Mode("sends its own old messages again, as they were and damaged"),
    # hostile/setups.py
    "channels": Mode("sets up channels one after another and uses none"),
    "half-open": Mode("begins set-ups of channels and ends none"),
    "opens": Mode("asks for workers of unknown services, with large bodies, and for the roster"),
    # hostile/sessions.py
    "forks": Mode("forks sessions into sessions that have rows"),
    "sessions": Mode("opens as many sessions as it can and keeps them by repeated requests"),
    "kv": Mode("fills the memory for keys and values and keeps it by repeated requests"),
    "queue": Mode("sends the largest steps without waiting for answers"),
    "replies": Mode("has large replies repeated again and again"),
    "closes": Mode("closes sessions that do not exist"),
    # hostile/images.py
    "image-steps": Mode("sends steps of images that are far too large", kind="image"),
    # hostile/workers.py
    "black-hole": Mode("claims room for all sessions and never answers", role="worker"),
    "mute": Mode("sets up channels and never answers a request", role="worker"),
    # hostile/redis_keys.py
    "redis-memory": Mode("adds large entries to streams of its own", transports=("redis",)),
    "redis-lanes": Mode("adds large entries to all workers' streams", transports=("redis",)),
    "redis-fleet": Mode(
        "rewrites lists of workers, the boot id and the roster", role="worker", transports=("redis",)
    ),
}

#: The name that stands for all modes that are possible.
ALL = "all"


def parse_modes(text: str | None, transport: TransportName, kinds: Sequence[WorkloadKind]) -> list[str]:
    """The modes that `--hostile` names, each once; all that are possible for `all`.

    Args:
        text: names separated by commas; None for no modes.
        transport: of the fleet.
        kinds: of the models that the fleet's workers serve.

    Raises:
        ConfigError: a mode is unknown, or this fleet has nothing that it could attack.
    """
    if text is None:
        return []
    impossible = {}
    for name, mode in MODES.items():
        if transport not in mode.transports:
            impossible[name] = f"it needs --transport {mode.transports[0]}"
        elif mode.kind not in kinds:
            impossible[name] = f"it needs --workload {mode.kind}"
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"invalid --hostile {text!r}: expected {ALL} or {', '.join(MODES)}")
    if names == [ALL]:
        return [name for name in MODES if name not in impossible]
    for name in names:
        if name not in MODES:
            raise ConfigError(f"invalid --hostile {name}: expected {ALL} or {', '.join(MODES)}")
        if name in impossible:
            raise ConfigError(f"--hostile {name}: {impossible[name]}")
    return list(dict.fromkeys(names))


def described() -> str:
    """The modes for `--help`: a Markdown list."""
    return "\n".join(f"- `{name}`: {mode.description}" for name, mode in MODES.items())

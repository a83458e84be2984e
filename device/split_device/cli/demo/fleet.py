"""The broker and the workers of a demo, as processes on this machine."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from split_common.system.console import stderr
from split_common.system.process import running_command, use_loopback_keys

#: A line of the broker's log: what it says of a message, its kind, and its channel, session and number.
_ROUTED = re.compile(r": routed ((REQUEST|REPLY) .*?: (channel \d+, session \w+, seq \d+), .*)")


@dataclass(frozen=True)
class DemoFleet:
    """A running broker and its workers."""

    #: Address of the broker.
    address: str
    #: Name of the model that the workers serve.
    model: str
    #: A directory for the demo's files.
    directory: Path

    def last_routed(self) -> list[str]:
        """The last step in the broker's log: a request and its reply, between which others may lie."""
        log = _log(self.directory).read_text(encoding="utf-8", errors="replace")
        requests: dict[str, str] = {}
        step: list[str] = []
        for routed in _ROUTED.finditer(log):
            line, kind, number = routed.groups()
            if kind == "REQUEST":
                requests[number] = line
            elif number in requests:
                step = [requests[number], line]
        return step


@contextlib.contextmanager
def running_fleet(served: Sequence[str], workers: int = 1) -> Iterator[DemoFleet]:
    """Starts a broker and workers with new keys, and ends them after the `with` block.

    Args:
        served: the workers' options for the model.

    Raises:
        SplitError: a process ended before it was ready.
    """
    with tempfile.TemporaryDirectory(prefix="lambda-split-demo-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        use_loopback_keys(directory)
        stderr.print(
            f"starting a broker and {'a worker' if workers == 1 else f'{workers} workers'} on this machine …"
        )
        command = ["broker", "--bind", "tcp://127.0.0.1:*"]
        debug = {"LAMBDA_SPLIT_LOG": "debug"}
        _, queue = stack.enter_context(running_command(command, _log(directory), debug))
        command = ["worker", "--broker", queue["address"], *served]
        bodies = [stack.enter_context(running_command(command))[1] for _ in range(workers)]
        yield DemoFleet(queue["address"], str(bodies[0]["model"]), directory)


def _log(directory: Path) -> Path:
    return directory / "broker.log"

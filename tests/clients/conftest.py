"""A fleet whose server the clients ask: processes of the main environment, in which no client is."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

#: The command of the main environment.
COMMAND = os.environ.get("CLIENTS_COMMAND", str(ROOT / ".venv" / "bin" / "lambda-split"))

KEY = "a-key"

#: What clients call the model.
MODEL = "smollm2"


def started(*words: str, **environment: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """A process that runs until it is stopped, and what it says of itself when it is ready."""
    process = subprocess.Popen(
        [COMMAND, *words, "--json"], stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"{words[0]} has ended"
    return process, json.loads(line)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server, without a path: a new one, or what CLIENTS_SERVER names."""
    if given := os.environ.get("CLIENTS_SERVER"):
        yield given
        return
    home = tmp_path_factory.mktemp("home")
    private = {f"LAMBDA_SPLIT_{name}": str(home / name.lower()) for name in ("STATE", "CONFIG", "RUNTIME")}
    processes = []
    try:
        broker, facts = started("broker", "--bind", "tcp://127.0.0.1:*", **private)
        processes.append(broker)
        address = ["--broker", facts["address"]]
        processes.append(started("worker", *address, **private)[0])
        serve, facts = started(
            "serve", "--port", "0", "--served-model-name", MODEL, *address, **private, LAMBDA_SPLIT_API_KEY=KEY
        )
        processes.append(serve)
        yield facts["page"].rstrip("/")
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(60)


@pytest.fixture(scope="session")
def url(server: str) -> str:
    """The address for OpenAI's clients."""
    return f"{server}/v1"

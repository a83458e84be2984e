"""Language Pipes: two nodes on this machine, which it makes talk HTTP. It computes in bfloat16, as released.

The first node has the embeddings, two layers and the model's head; the second one all layers that follow. While
they run, both listen on all interfaces.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.systems.stream import Generate, Question, serve

#: What the checkpoint is called: an owner and a name, as in a hub.
NAME = "local/model"

#: Layers of the node that has the ends, as by default in lambda-split.
LOCAL_LAYERS = 2

#: GiB that the other node may use for layers.
MEMORY = 8

#: Seconds until both have loaded their parts.
LIMIT = 240.0


@contextmanager
def load(model: Path, work: Path, threads: int) -> Iterator[Generate]:
    if importlib.util.find_spec("language_pipes") is None:
        raise ModuleNotFoundError("No module named 'language_pipes'")
    (work / "models" / NAME).mkdir(parents=True)
    (work / "models" / NAME / "data").symlink_to(model)
    near, far, http_port = _free_ports(3)
    end = {"model_id": NAME, "num_local_layers": LOCAL_LAYERS, "device": "cpu"}
    layers = {"model_id": NAME, "device": "cpu", "memory": MEMORY, "data_type": 16}
    first_node = [{"address": "127.0.0.1", "port": near}]
    with ExitStack() as stack:
        node = _node(work, "near", near, threads, job_port=http_port, end_models=[end])
        _wait(lambda: _models(http_port) is not None, stack.enter_context(node))
        node = _node(work, "far", far, threads, layer_models=[layers], bootstrap_nodes=first_node)
        _wait(lambda: NAME in (_models(http_port) or ""), stack.enter_context(node))
        yield lambda question: _answer(http_port, question)


@contextmanager
def _node(work: Path, name: str, port: int, threads: int, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a node."""
    import toml

    common = {"node_id": name, "network_ip": "127.0.0.1", "peer_port": port}
    config = work / f"{name}.toml"
    config.write_text(toml.dumps(common | settings))
    environment = {
        # It writes its logs below it.
        "HOME": str(work),
        "LP_APP_DIR": str(work / name),
        "LP_MODEL_DIR": str(work / "models"),
        "OMP_NUM_THREADS": str(threads),
        # Two processes take turns on the same cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "language_pipes.cli", "--config", str(config), "run"]
    process = subprocess.Popen(command, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait(ready: Callable[[], bool], node: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + LIMIT
    while not ready():
        if node.poll() is not None:
            raise RuntimeError(f"a node has ended, with exit code {node.returncode}")
        if time.monotonic() > until:
            raise TimeoutError(f"the nodes have no complete pipe after {LIMIT:.0f} s")
        time.sleep(0.5)


def _models(port: int) -> str | None:
    """What models there are, as text; None without a server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/v1/models")
        return connection.getresponse().read().decode()
    except OSError:
        return None
    finally:
        connection.close()


def _answer(port: int, question: Question) -> Iterator[str]:
    """The text of each token as it comes. One more is asked for, because the last one is not sent by itself."""
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": question.text}],
        "max_completion_tokens": question.tokens + 1,
        "temperature": 0,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise RuntimeError(f"status {response.status}: {response.read(200)!r}")
        pieces = 0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            told = json.loads(line.removeprefix(b"data: "))
            if "error" in told:
                raise RuntimeError(str(told["error"]))
            # To the end, so that nothing of it runs beside the next system.
            if (text := told["choices"][0]["delta"].get("content")) and pieces < question.tokens:
                pieces += 1
                yield text
    finally:
        connection.close()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    serve(load, sys.argv[1:])

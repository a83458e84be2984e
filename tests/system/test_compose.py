"""`compose.yaml`: what it promises, and its very commands as processes, with local files in place of mounts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import tiny
import tiny_diffusion
from split_common.cli import main
from split_common.system.servers import free_port
from split_device import SplitModelForCausalLM
from valkeys import BINARY, tls_before
from wiretap import LATE

ROOT = Path(__file__).parents[2]
PROMPT = torch.tensor([[5, 17, 33, 4, 61, 12, 80, 7, 29, 44]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


def settings() -> dict[str, str]:
    """Of `.env.example`."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def composed(**changes: str) -> Any:
    """The file with its variables filled in, as Compose does it."""
    values = settings() | changes

    def fill(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        assert name in values or (default or "").startswith(":-"), f"{name} has no value"
        return values.get(name) or default.removeprefix(":-")

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        if isinstance(node, str):
            return re.sub(r"(?<!\$)\$\{(\w+)(:[-?][^}]*)?\}", fill, node).replace("$$", "$")
        return node

    return walk(yaml.safe_load((ROOT / "compose.yaml").read_text()))


def test_every_setting_is_one_of_the_files() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "compose.yaml").read_text()))
    listed = set(re.findall(r"^#? ?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert used == listed


def test_services_are_confined() -> None:
    services = composed()["services"]
    assert sorted(services) == sorted(["broker", "redis", "redis-worker", "worker"])
    for name, service in services.items():
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"]), name
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"]
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
        writable = {volume.split(":")[1] for volume in service["volumes"] if not volume.endswith(":ro")}
        assert writable <= {"/data", "/cache"}, name
    for name in ("worker", "redis-worker"):
        assert services[name]["deploy"]["replicas"] == "2"
        assert services[name]["stop_grace_period"] == "60s"


def test_redis_keeps_what_it_has_and_throws_nothing_away() -> None:
    words = composed()["services"]["redis"]["command"]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--port"] == "0"
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"


@pytest.mark.parametrize("component", ["device", "worker"])
def test_containers_have_what_models_need(component: str) -> None:
    """The demo model's format, and images."""
    install = re.search(r"pip install .* '\.\[([\w,]+)\]'", (ROOT / component / "Dockerfile").read_text())
    assert install is not None
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(install[1].split(",")) == {"diffusion", "gguf"} <= set(extras)


def test_compose_takes_it() -> None:
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("there is no docker with the compose plugin")
    command = [
        "docker",
        "compose",
        "--env-file",
        ".env.example",
        "--profile",
        "zmq",
        "--profile",
        "redis",
        "config",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- its commands as processes -----------------------------------------------------------------------------


@dataclass
class Host:
    """The machine of the containers: the directory `deploy`, and where ports of containers are here."""

    deploy: Path
    bin: Path
    #: What stands for what, e.g. `broker:7411` for an address of loopback.
    places: dict[str, str] = field(default_factory=dict)

    def command(self, service: Any, secrets: Any) -> tuple[list[str], dict[str, str]]:
        """A service's command line and environment, with paths of this machine."""
        entrypoint, env = _dockerfile(service)
        words = [*service.get("entrypoint", entrypoint), *service["command"]]
        volumes = [volume.split(":")[:2] for volume in service["volumes"]]
        mounts = {container: str(self.deploy.parent / host) for host, container in volumes}
        for name in service.get("secrets", []):
            mounts[f"/run/secrets/{name}"] = str(self.deploy.parent / secrets[name]["file"])
        places = mounts | self.places
        pattern = re.compile(
            "|".join(rf"(?<![\w.]){re.escape(place)}(?!\w)" for place in sorted(places, reverse=True))
        )

        def here(text: str) -> str:
            return pattern.sub(lambda match: places[match[0]], text)

        path = f"{self.bin}:{os.environ['PATH']}"
        return [here(word) for word in words], {name: here(value) for name, value in env.items()} | {"PATH": path}

    @contextlib.contextmanager
    def running(self, name: str, words: list[str], env: dict[str, str], ready: str) -> Iterator[None]:
        """Runs a command until the context ends; waits until it says that it is ready."""
        log = self.deploy.parent / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                words, env={**os.environ, **env}, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )
        try:
            deadline = time.monotonic() + LATE
            while not re.search(ready, log.read_text()):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait(LATE)


def _dockerfile(service: Any) -> tuple[list[str], dict[str, str]]:
    """Entrypoint and environment of a component's image."""
    if "build" not in service:
        return [], {}
    text = (ROOT / service["build"]["dockerfile"]).read_text()
    entrypoint = re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    assert entrypoint is not None
    env = dict(
        pair.split("=", 1) for line in re.findall(r"^ENV (.*)$", text, re.MULTILINE) for pair in line.split()
    )
    return json.loads(entrypoint[1]), env


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """The files that docs/deploying.md asks for."""
    fleet, deploy, bin_ = tmp_path / "fleet", tmp_path / "deploy", tmp_path / "bin"
    tiny.save("llama", tmp_path / "models" / "my-model")
    assert main(["keys", "init", "--keys", str(fleet)]) == 0
    assert main(["keys", "add-model", str(tmp_path / "models" / "my-model"), "--keys", str(fleet)]) == 0
    for name, files in (
        ("broker", ["broker.key"]),
        ("worker", ["worker-1.key", "models"]),
        ("device", ["device-1.key", "models"]),
    ):
        (deploy / name).mkdir(parents=True)
        for file in (*files, "operator.pub", "roster"):
            subprocess.run(["cp", "-rp", fleet / file, deploy / name], check=True)
    (tmp_path / "cache").mkdir()
    bin_.mkdir()
    script = bin_ / "lambda-split"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m split_common "$@"\n')
    script.chmod(0o755)
    (bin_ / "valkey-server").symlink_to(BINARY)
    return Host(deploy, bin_)


def check_generation(host: Host, broker: str) -> None:
    checkpoint = host.deploy.parent / "models" / "my-model"
    with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker, keys=host.deploy / "device") as model:
        assert torch.equal(model.generate(PROMPT, **GREEDY), tiny.build("llama").generate(PROMPT, **GREEDY))


def test_the_zeromq_profile_generates(host: Host) -> None:
    services = composed()["services"]
    address = f"127.0.0.1:{free_port()}"
    host.places = {"0.0.0.0:7411": address, "broker:7411": address}
    with (
        host.running("broker", *host.command(services["broker"], {}), ready="broker on"),
        host.running("worker", *host.command(services["worker"], {}), ready="serves"),
    ):
        check_generation(host, f"tcp://{address}")


@pytest.mark.long
def test_the_zeromq_profile_makes_images(host: Host) -> None:
    model = tiny_diffusion.save_sdxl(host.deploy.parent / "models")
    assert main(["keys", "add-model", str(model), "--keys", str(host.deploy.parent / "fleet")]) == 0
    for name in ("worker", "device"):
        subprocess.run(["cp", "-rp", host.deploy.parent / "fleet" / "models", host.deploy / name], check=True)
    services = composed(MODEL=f"/models/{model.name}", LAYERS="1:-1")["services"]
    address = f"127.0.0.1:{free_port()}"
    host.places = {"0.0.0.0:7411": address, "broker:7411": address}
    image = host.deploy.parent / "image.png"
    with (
        host.running("broker", *host.command(services["broker"], {}), ready="broker on"),
        host.running("worker", *host.command(services["worker"], {}), ready="serves"),
    ):
        options = ["--keys", str(host.deploy / "device"), "--broker", f"tcp://{address}", "--steps", "1"]
        assert main(["image", "a seven", "-o", str(image), "--model", str(model), *options]) == 0
    assert image.stat().st_size > 0


@pytest.mark.long
def test_the_redis_profile_generates(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """Valkey's TLS is done before it here: the package's server has none."""
    file = composed()
    redis = host.deploy / "redis"
    for name in ("tls", "acl", "data"):
        (redis / name).mkdir(parents=True)
    capsys.readouterr()
    acl = ["redis-acl", "--keys", str(host.deploy.parent / "fleet"), "--format", "aclfile"]
    assert main([*acl, "--passwords", str(redis / "passwords")]) == 0
    (redis / "acl" / "users.acl").write_text("user default off\n" + capsys.readouterr().out)
    words, env = host.command(file["services"]["redis"], {})
    options = dict(zip(words[1::2], words[2::2], strict=True))
    port = free_port()
    plain = {name: value for name, value in options.items() if not name.startswith("--tls")}
    plain |= {"--port": str(port), "--bind": "127.0.0.1"}
    server = [words[0], *(word for pair in plain.items() for word in pair)]
    with (
        host.running("redis", server, env, ready="Ready to accept connections"),
        tls_before(SimpleNamespace(port=port), redis / "tls") as (tls_port, ca_file),  # type: ignore[arg-type]
    ):
        ca_file.rename(redis / "tls" / "ca.crt")
        host.places = {"redis:6379": f"127.0.0.1:{tls_port}"}
        with host.running(
            "worker", *host.command(file["services"]["redis-worker"], file["secrets"]), ready="serves"
        ):
            password = (redis / "passwords" / "device-1.password").read_text().strip()
            address = f"rediss://device-1:{password}@127.0.0.1:{tls_port}?ssl_ca_certs={redis / 'tls' / 'ca.crt'}"
            check_generation(host, address)
    assert any((redis / "data").rglob("*.aof"))

"""Components know `common`, never each other; and the broker needs neither torch nor transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "split_common": ROOT / "common",
    "split_broker": ROOT / "broker",
    "split_worker": ROOT / "worker",
    "split_device": ROOT / "device",
}
LIGHT = [
    "split_broker.broker",
    "split_broker.peer_queue",
    *(
        f"split_common.{name}"
        for name in (
            "headers",
            "payloads",
            "channel",
            "handshake",
            "transport.zmq_link",
            "transport.redis.link",
            "keys",
            "fleet",
            "errors",
        )
    ),
]


def modules(source: str) -> set[str]:
    """All that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names.update(arg.value for arg in node.args if isinstance(arg, ast.Constant))
    return names


def imported(source: str) -> set[str]:
    """Top-level names of all that a module imports."""
    return {name.split(".")[0] for name in modules(source)}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    files = sorted((PACKAGES[package] / package).rglob("*.py"))
    assert files
    strangers = set(PACKAGES) - {package, "split_common"}
    for path in files:
        assert not imported(path.read_text()) & strangers, path


def commands_of(path: Path) -> bool:
    """Whether a module belongs to the command line: to a `cli` package, or a component's module of that name."""
    return "cli" in path.parts or path.name in ("cli.py", "__main__.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_only_commands_need_the_command_line(package: str) -> None:
    root = PACKAGES[package] / package
    files = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    # This one is to become a command of `split_common.cli`.
    files = [path for path in files if not commands_of(path) and path.name != "acl.py"]
    assert files
    for path in files:
        names = modules((root / path).read_text())
        assert not {name for name in names if {"typer", "cli"} & set(name.split("."))}, path


def test_the_check_sees_an_import_wherever_it_is() -> None:
    hidden = "def f():\n    from split_worker.bodies import base\n    importlib.import_module('a.b')"
    assert {"split_worker", "a"} <= imported(hidden)


def test_the_broker_imports_no_torch() -> None:
    code = (
        f"import sys, importlib\nfor name in {LIGHT!r}: importlib.import_module(name)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(ast.literal_eval(output))
    assert "split_broker" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "split_device", "split_worker"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("split_common.transport.redis.link", {"zmq"}),
        ("split_common.transport.zmq_link", {"redis"}),
        ("split_common.options", {"nacl", "msgspec", "zmq", "redis"}),
        ("split_common.trust.fleet", {"zmq", "redis"}),
    ],
)
def test_a_module_loads_only_the_libraries_that_it_needs(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}\nprint(sorted({{name.split('.')[0] for name in sys.modules}}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not unwanted & set(ast.literal_eval(output))


def test_only_image_models_need_diffusers() -> None:
    code = (
        "import sys\nsys.modules['diffusers'] = None\n"
        "import split_device.cli, split_worker.cli, split_worker.bodies.loading\n"
        "from split_device import SplitModelForCausalLM\n"
        "try:\n    from split_device import SplitUNet2DConditionModel\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "diffusers" in output

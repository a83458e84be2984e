"""The floors: who may import whom, between components and within them; and how long files and functions may be.

Every import counts, wherever in a module it stands: also within a function, or for type checkers only.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "split_common": ROOT / "common",
    "split_broker": ROOT / "broker",
    "split_worker": ROOT / "worker",
    "split_device": ROOT / "device",
}

#: The floors of each component, lowest first: sub-packages, and modules that lie beside them. A module may import
#: from its own floor and from lower ones. A component's own `__init__`, its public names, is above all of them.
FLOORS = {
    "split_common": [
        *("errors", "compat", "system", "trust", "protocol", "transport", "models", "engine"),
        *("demo_model", "cli"),
    ],
    "split_device": [
        *("sessions", "models", "speculation", "generation"),
        *("images", "jobs", "serving", "submission", "batches", "stress", "cli"),
    ],
    "split_worker": [
        "limits",
        "watchdog",
        "set_ups",
        "channels",
        "bodies",
        "sessions",
        "repeats",
        "requests",
        "waiting",
        "compute",
        "worker",
        "cli",
    ],
    "split_broker": [
        *("connections", "memory", "under_way", "peer_queue", "set_ups", "access", "guard", "quotas"),
        *("router", "delivery", "opens", "broker"),
        "cli",
    ],
}

#: The packages that alone may import a library. Of all that devices and workers share, only what loads and runs
#: models needs torch.
CONFINED = {
    "typer": ["split_common.cli", "split_broker.cli", "split_worker.cli", "split_device.cli"],
    "torch": ["split_common.models", "split_common.engine", "split_common.compat", "split_worker", "split_device"],
    "transformers": [
        "split_common.models",
        "split_common.engine",
        "split_common.compat",
        "split_worker",
        "split_device",
    ],
}

#: All that `protocol` may import beside the standard library and lower floors. It computes bytes: no sockets.
PROTOCOL_LIBRARIES = {"msgspec", "nacl"}

#: Modules of the standard library that open sockets, or wait for them.
NETWORK = {
    *("asyncio", "ftplib", "http", "imaplib", "multiprocessing", "poplib", "select", "selectors", "smtplib"),
    *("socket", "socketserver", "ssl", "urllib", "wsgiref", "xmlrpc"),
}

#: Most lines of a file, and of a function that is not a command.
FILE_LINES = 400
FUNCTION_LINES = 60

#: Files that may be longer, at most two: each says why in its docstring, with the words "over 400 lines".
LONG_FILES: tuple[str, ...] = ()

#: What a broker imports, and a peer before it loads a model.
LIGHT = [
    "split_broker.broker",
    "split_broker.peer_queue",
    "split_broker.under_way",
    "split_common.errors",
    "split_common.protocol.headers",
    "split_common.protocol.encoding",
    "split_common.protocol.payloads",
    "split_common.protocol.channel",
    "split_common.protocol.handshake",
    "split_common.transport.zmq_link",
    "split_common.transport.zmq_socket",
    "split_common.transport.redis.link",
    "split_common.trust.keys",
    "split_common.trust.fleet",
]


def modules() -> dict[str, Path]:
    """All modules of all components, by name."""
    found = {}
    for package, directory in PACKAGES.items():
        for path in sorted((directory / package).rglob("*.py")):
            parts = path.relative_to(directory).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(source: str, known: set[str] | None = None) -> set[str]:
    """The modules that a source imports, wherever in it; of `from a import b`, `a.b` if that is a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            base = node.module or ""
            members = {f"{base}.{alias.name}" for alias in node.names}
            submodules = members & (MODULES.keys() if known is None else known)
            names.update(submodules)
            if len(submodules) < len(members):
                names.add(base)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names.update(arg.value for arg in node.args if isinstance(arg, ast.Constant))
    return names


IMPORTS = {name: imported(path.read_text()) for name, path in MODULES.items()}


def top(name: str) -> str:
    return name.partition(".")[0]


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def floor(name: str) -> int:
    """The height of a module in its component. Raises ValueError for one that is on no floor."""
    component, _, rest = name.partition(".")
    room = rest.partition(".")[0]
    return FLOORS[component].index(room) if room not in ("", "__main__") else len(FLOORS[component])


def arrows_up(imports: dict[str, set[str]]) -> Iterator[str]:
    """The imports, within a component, from a higher floor."""
    for name, targets in imports.items():
        for target in sorted(targets):
            if top(target) == top(name) and floor(target) > floor(name):
                yield f"{name} imports {target}"


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other: Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in imports[name] & imports.keys():
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in imports:
        if name not in index:
            visit(name)
    return found


def long_functions(source: str, may_be_command: bool = False) -> list[str]:
    """The names of the functions with too many lines, but for commands: their parameters are options."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kinds = [ast.unparse(each.annotation) for each in node.args.args if each.annotation is not None]
            is_command = may_be_command and any("typer." in kind or kind.endswith("Option") for kind in kinds)
            if not is_command and (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES:
                found.append(node.name)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_components_know_only_common(package: str) -> None:
    strangers = set(PACKAGES) - {package, "split_common"}
    own = {name: targets for name, targets in IMPORTS.items() if top(name) == package}
    assert own
    for name, targets in own.items():
        assert not {top(target) for target in targets} & strangers, name


def test_every_module_has_a_floor() -> None:
    for name in MODULES:
        floor(name)
    for component, rooms in FLOORS.items():
        assert {f"{component}.{room}" for room in rooms} <= MODULES.keys()


def test_no_import_leads_up() -> None:
    assert not list(arrows_up(IMPORTS))


def test_no_circle_of_imports() -> None:
    assert not circles(IMPORTS)


@pytest.mark.parametrize("library", CONFINED)
def test_libraries_stay_where_they_belong(library: str) -> None:
    for name, targets in IMPORTS.items():
        if library in {top(target) for target in targets}:
            assert any(is_within(name, place) for place in CONFINED[library]), f"{name} imports {library}"


def test_modules_of_compat_stay_where_their_libraries_do() -> None:
    libraries = {each: {top(target) for target in IMPORTS[each]} & CONFINED.keys() for each in IMPORTS}
    for name, targets in IMPORTS.items():
        for used in {each for each in targets if is_within(each, "split_common.compat")}:
            assert all(any(is_within(name, place) for place in CONFINED[each]) for each in libraries[used]), name


def test_the_protocol_needs_few_libraries_and_no_socket() -> None:
    assert sys.stdlib_module_names >= NETWORK
    for name, targets in IMPORTS.items():
        if is_within(name, "split_common.protocol"):
            used = {top(target) for target in targets} - {"split_common"}
            assert used - sys.stdlib_module_names <= PROTOCOL_LIBRARIES, name
            assert not used & NETWORK, name


def test_files_and_functions_are_short() -> None:
    assert len(LONG_FILES) <= 2
    for name, path in MODULES.items():
        source = path.read_text()
        is_long = len(source.splitlines()) > FILE_LINES
        assert is_long == (name in LONG_FILES), name
        if is_long:
            assert f"over {FILE_LINES} lines" in (ast.get_docstring(ast.parse(source)) or ""), name
        assert not long_functions(source, ".cli" in name), name


def test_the_checks_see_what_they_are_for() -> None:
    hidden = "def f():\n    from split_worker.nowhere import Body\n    importlib.import_module('a.b')"
    assert imported(hidden) == {"split_worker.nowhere", "a.b"}
    assert imported("from p import m, n", {"p.m"}) == {"p.m", "p"}
    up: dict[str, set[str]] = {
        "split_common.errors": {"split_common.models.split"},
        "split_common.models.split": set(),
    }
    assert list(arrows_up(up)) == ["split_common.errors imports split_common.models.split"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    body = "    pass\n" * FUNCTION_LINES
    long = f"def f(x: ModelOption):\n{body}class C:\n  async def g(self):\n{body}def h():\n{body[9:]}"
    assert long_functions(long) == ["f", "g"]
    assert long_functions(long, may_be_command=True) == ["g"]
    with pytest.raises(ValueError, match="is not in list"):
        floor("split_common.nowhere")


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
        ("split_common.cli.options", {"torch", "transformers", "zmq", "redis"}),
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

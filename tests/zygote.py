"""Commands that tests start are forked from a process that has imported everything: most of a start is imports.

Such a process is a child of the one that asked for it, and has the files, arguments, environment, directory and
session that it was to have. Only `python -m` of what `FORKED` names is forked, in an environment in which imports
give the same. All else starts as ever, and so does what a forked process starts, unless it is one of `PARENTS`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from split_common.system import process

#: What is run in forks: modules, with the first word after them. A broker is not: it starts without torch, and its
#: memory is limited. Nor is what measures memory, which forks share, or enters a network of its own.
FORKED = re.compile(r"(split_common (?!broker)|worker_main |benchmarks\.(?!memory|wan|ping|forwarder)).*")

#: Those whose own processes are forked as well.
PARENTS = re.compile(r"benchmarks\..*")

#: Modules that commands import when they start.
IMPORTS = (
    *("fleet", "split_common.cli.application", "split_broker.cli", "split_worker.cli", "split_device.cli"),
    *("split_worker.worker", "split_worker.bodies.loading", "split_device.models.language"),
    *("split_device.jobs.runner", "split_device.cli.serve", "split_device.serving.server", "uvicorn"),
    *("transformers.generation", "transformers.models.llama.modeling_llama"),
)

#: Variables that no module reads when it is imported. If another one differs, a process is started as ever.
LATE_VARIABLES = re.compile(r"LAMBDA_SPLIT_\w+|PYTEST_CURRENT_TEST|TMPDIR|TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR")

#: What commands set before they import torch and the hub.
COMMANDS_VARIABLES = {"HF_HUB_VERBOSITY": "error", "GOMP_SPINCOUNT": process.SPIN_COUNT}

#: Bytes of a command line that can be shown.
SHOWN = 4096

#: Operation of prctl(2): this process becomes the parent of orphans among its descendants.
PR_SET_CHILD_SUBREAPER = 36


class Zygote:
    """The process that is forked: it starts when it is first needed. Only Linux can hand its children over.

    Args:
        connection: one to such a process that runs already.
    """

    def __init__(self, connection: socket.socket | None = None) -> None:
        self._environment = {**os.environ, **COMMANDS_VARIABLES}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection = connection

    def install(self) -> None:
        """From now on `subprocess` forks what it can."""
        if sys.platform != "linux":
            return
        execute = subprocess.Popen._execute_child  # type: ignore[attr-defined]

        def fork(popen: Any, args: Any, *others: Any) -> None:
            if not self._execute(popen, args, *others):
                execute(popen, args, *others)

        subprocess.Popen._execute_child = fork  # type: ignore[attr-defined]

    def end(self) -> None:
        """Ends the process, if there is one; those that were forked go on."""
        if self._connection is not None and self._process is not None:
            self._connection.close()
            self._process.wait()
            self._connection = self._process = None

    def _execute(
        self,
        popen: Any,
        args: Any,
        executable: Any,
        preexec_fn: Any,
        close_fds: bool,
        pass_fds: Any,
        cwd: Any,
        env: Any,
        startupinfo: Any,
        creationflags: int,
        shell: bool,
        *rest: Any,
    ) -> bool:
        """Does what the method of `subprocess.Popen` does, if it can."""
        stdin, stdin_here, stdout_here, stdout, stderr_here, stderr, _, gid, gids, uid, umask, session, group = rest
        special = (executable, preexec_fn, pass_fds, shell, gid, gids, uid, umask != -1, group != -1)
        environment = dict(os.environ if env is None else env)
        if any(special) or not _runs_module(args) or not self._same(environment):
            return False
        # A file that is not redirected is this process's own.
        files = [number if file == -1 else file for number, file in enumerate((stdin, stdout, stderr))]
        if any(map(os.isatty, files)):
            return False
        request = {
            "args": [os.fspath(word) for word in args],
            "cwd": str(cwd or Path.cwd()),
            "env": environment,
            "session": session,
        }
        popen.pid = self._fork(json.dumps(request).encode(), files)
        popen._child_created = True
        popen._close_pipe_fds(stdin, stdin_here, stdout_here, stdout, stderr_here, stderr)
        return True

    def _same(self, environment: dict[str, str]) -> bool:
        differing = {name for name, _ in self._environment.items() ^ {**environment, **COMMANDS_VARIABLES}.items()}
        return all(map(LATE_VARIABLES.fullmatch, differing))

    def _fork(self, request: bytes, files: Sequence[int]) -> int:
        answer, its = socket.socketpair()
        libc = ctypes.CDLL(None)
        with self._lock, answer:
            if self._connection is None:
                self._start()
            assert self._connection is not None
            libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                with its:
                    socket.send_fds(self._connection, [request], [its.fileno(), *files])
                return int(answer.recv(64))
            finally:
                libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def _start(self) -> None:
        self._connection, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            command = [sys.executable, "-P", __file__, str(its.fileno()), json.dumps(sys.path), " " * SHOWN]
            null = subprocess.DEVNULL
            self._process = subprocess.Popen(
                command, stdin=null, stdout=null, stderr=null, env=self._environment, pass_fds=[its.fileno()]
            )


def _runs_module(args: Any) -> bool:
    match args:
        case [sys.executable, "-P", "-m", module, word, *_] | [sys.executable, "-m", module, word, *_]:
            return FORKED.fullmatch(f"{module} {word}") is not None
    return False


def serve(connection: socket.socket) -> dict[str, Any]:
    """Forks for each request. Returns it in the new process. Ends this one when nobody is left who asks."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1024 * 1024, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            # An orphan goes to whoever asked: its parent ends, and this one cannot receive orphans.
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.001)
            connection.close()
            request: dict[str, Any] = json.loads(message)
            become(request, *files)
            return request
        os.wait()
        for file in files:
            os.close(file)


def become(request: dict[str, Any], answer: int, *files: int) -> None:
    """Makes this process what was asked for, and says its id."""
    if request["session"]:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
    sys.stdin, sys.stdout, sys.stderr = map(reopened, (sys.stdin, sys.stdout, sys.stderr))
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    show(request["args"])
    os.write(answer, str(os.getpid()).encode())
    for file in (answer, *files):
        os.close(file)


def reopened(stream: Any) -> io.TextIOWrapper:
    """A standard stream, made anew for the file that it has now."""
    return io.TextIOWrapper(
        os.fdopen(stream.fileno(), stream.buffer.mode, closefd=False),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def show(command: Sequence[str]) -> None:
    """Makes a command line the one that `ps` shows."""
    stat = Path("/proc/self/stat").read_text()
    begin, end = map(int, stat.rpartition(")")[2].split()[45:47])
    shown = " ".join(command).encode()[: end - begin - 2]
    # A last byte that is not 0 says that the line was overwritten.
    ctypes.memmove(begin, shown.ljust(end - begin - 1, b"\0") + b" ", end - begin)


def beget() -> None:
    """Leaves a process like this one, of which those are forked that this one starts."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        there.close()
        Zygote(here).install()
        return
    here.close()
    # Whoever reads what this process says does not wait for that one.
    with Path(os.devnull).open("r+b") as null:
        for number in range(3):
            os.dup2(null.fileno(), number)
    show(["zygote"])
    run(serve(there)["args"])


def run(command: Sequence[str]) -> None:
    """What `python -m` does. Ends this process."""
    at = command.index("-m") + 1
    if "-P" not in command[:at]:
        sys.path.insert(0, str(Path.cwd()))
    sys.argv = [*command[at:]]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = json.loads(sys.argv[2])
    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    command = serve(socket.socket(fileno=int(sys.argv[1])))["args"]
    if PARENTS.fullmatch(" ".join(command[command.index("-m") + 1 :][:2])):
        beget()
    run(command)

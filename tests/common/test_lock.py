"""A lock that says which process holds it, and that ends with its holder."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from split_common.system.lock import Held, holder, holding

HOLD = "import sys, pathlib\nfrom split_common.system.lock import holding\n" + (
    "with holding(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


def test_a_process_holds_it_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "dir" / "lock"
    assert holder(path) is None
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert holder(path) == process.pid
        with pytest.raises(Held) as raised, holding(path):
            pass
        assert raised.value.pid == process.pid
        process.kill()
    assert holder(path) is None
    with holding(path):
        assert holder(path) == os.getpid()
    assert holder(path) is None


def test_a_process_that_asks_is_not_taken_for_the_holder(tmp_path: Path) -> None:
    """An earlier holder's process id is in the file still: it may be another process's by now."""
    path = tmp_path / "lock"
    with holding(path):
        pass
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert path.read_text() == str(os.getpid())
        assert holder(path) is None

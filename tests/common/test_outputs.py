"""Files that commands write for their users: what is there already, links, pipes, devices, and what is refused."""

from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from split_common.errors import ConfigError
from split_common.system.outputs import check_output, is_stream, write_output
from split_common.system.process import python


def write(path: Path, data: bytes) -> None:
    check_output(path)
    write_output(path, data)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_is_the_users_alone_and_an_old_one_keeps_its_permissions(tmp_path: Path) -> None:
    write(tmp_path / "new", b"1")
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "old").chmod(0o664)
    write(tmp_path / "old", b"2")
    assert [(path.name, path.read_bytes(), mode(path)) for path in sorted(tmp_path.iterdir())] == [
        ("new", b"1", 0o600),
        ("old", b"2", 0o664),
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_an_old_file_keeps_its_owner(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    os.chown(tmp_path / "old", 12345, 23456)
    write(tmp_path / "old", b"2")
    found = (tmp_path / "old").stat()
    assert (found.st_uid, found.st_gid) == (12345, 23456)


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("there", "to be made"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "there").write_bytes(b"a longer text than the new one")
    for name in ("there", "to be made"):
        write(tmp_path / name, b"new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "elsewhere" / name).read_bytes() == b"new"
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "file")
    for name, message in (("circle", "leads to itself"), ("nowhere", "gone is not a directory")):
        with pytest.raises(ConfigError, match=message):
            check_output(tmp_path / name)


def test_a_file_of_two_names_keeps_both(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"a longer text than the new one")
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    write(tmp_path / "two", b"new")
    assert (tmp_path / "one").read_bytes() == b"new"


class Interrupted(io.BytesIO):
    """Ctrl-C is pressed whenever it is read."""

    def read(self, size: int | None = -1) -> bytes:
        signal.raise_signal(signal.SIGINT)
        return super().read(size)


def test_ctrl_c_leaves_no_half_of_a_file_that_is_written_in_place(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"a longer text than the new one")
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        write_output(tmp_path / "two", Interrupted(b"new"))
    assert (tmp_path / "one").read_bytes() == b"new"


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()), daemon=True)
    check_output(fifo)  # Nobody reads yet, and this does not wait.
    reader.start()
    write_output(fifo, b"x" * 1_000_000)
    reader.join()
    assert read == [b"x" * 1_000_000]
    assert is_stream(fifo)


def test_it_is_said_that_a_pipe_has_no_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, said = tmp_path / "pipe", ""
    os.mkfifo(pipe)
    writer = threading.Thread(target=write_output, args=(pipe, b"late"))
    writer.start()
    while "waiting for somebody who reads it" not in said:
        said += capsys.readouterr().err
    assert pipe.read_bytes() == b"late"
    writer.join()


def test_devices_are_written_to(tmp_path: Path) -> None:
    before = Path("/dev/null").stat().st_rdev
    write(Path("/dev/null"), b"x")
    assert Path("/dev/null").stat().st_rdev == before
    check_output(Path("/dev/full"))
    with pytest.raises(ConfigError, match="/dev/full cannot be written: No space left on device"):
        write_output(Path("/dev/full"), b"x")


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_stdout_is_continued_wherever_it_leads(name: str, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from split_common.system.outputs import check_output, write_output
print("before", flush=True)
check_output(Path({name!r}))
write_output(Path({name!r}), b"output\\n")
print("after")
"""
    with (tmp_path / "file").open("wb") as file:
        subprocess.run(python("-c", code), stdout=file, check=True)
    assert (tmp_path / "file").read_text() == "before\noutput\nafter\n"
    piped = subprocess.run(python("-c", code), capture_output=True, text=True, check=True)
    assert piped.stdout == "before\noutput\nafter\n"


def test_an_input_is_not_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "twin").hardlink_to(source)
    for name in ("source", "link", "twin"):
        with pytest.raises(ConfigError, match=f"{name} is the input: choose another output"):
            check_output(tmp_path / name, None, source)
    check_output(tmp_path / "other", None, source, tmp_path / "missing")


def test_what_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path, "is a directory"),
        (tmp_path / "none" / "file", "none is not a directory"),
        (tmp_path / "file" / "below", "file is not a directory"),
        (Path("/proc/file"), "cannot be written"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
    ):
        with pytest.raises(ConfigError, match=message) as refused:
            check_output(path)
        assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_output(tmp_path / "old", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old", b"old")]


def test_a_file_that_cannot_be_replaced_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like one that is a mount of its own in a container, or in a directory of somebody else's."""
    (tmp_path / "old").write_bytes(b"a longer text than the new one")

    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", busy)
    write(tmp_path / "old", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old", b"new")]


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(Path("~/out"), b"x")
    write(Path("~nobody-of-this-name"), b"y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "~nobody-of-this-name"]

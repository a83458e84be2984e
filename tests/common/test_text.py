"""Text that comes in and goes out: byte order marks, encodings, what ends a line, and what a terminal obeys."""

from __future__ import annotations

import io
import json
import sys
import unicodedata
from pathlib import Path

import pytest
from rich.table import Table

from split_common.errors import ConfigError
from split_common.system import console
from split_common.system.text import check_text, decode_text, for_terminal, json_line, parse_json, read_text

EVERYTHING = "".join(map(chr, range(sys.maxunicode + 1)))


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    assert decode_text("naïve".encode("utf-8-sig"), "it") == "naïve"
    assert parse_json(b"\xef\xbb\xbf[1]", "it") == [1]
    path = tmp_path / "prompt"
    path.write_bytes("One\r\ntwo".encode("utf-8-sig"))
    assert read_text(path) == "One\r\ntwo"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-32-be"])
def test_wide_encodings_are_refused_by_name(encoding: str) -> None:
    data = '["ab"]'.encode(encoding)
    if encoding.endswith("e"):
        # Without a mark they can only be told by their NUL bytes.
        with pytest.raises(ConfigError, match="it is not text: it has a NUL byte"):
            decode_text(data, "it")
        data = "\ufeff".encode(encoding) + data
    for read in (decode_text, parse_json):
        with pytest.raises(ConfigError, match=f"^it is {encoding[:6].upper()}: save it as UTF-8$"):
            read(data, "it")


def test_other_encodings() -> None:
    assert decode_text("naïve".encode("latin-1"), "stdin", "latin-1") == "naïve"
    assert decode_text("naïve".encode("utf-8-sig"), "stdin", "latin-1") == "naïve"
    for read in (decode_text, parse_json):
        with pytest.raises(ConfigError, match="it is not UTF-8"):
            read('"naïve"'.encode("latin-1"), "it")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON: Input data was truncated"),
        (b'{"secret": 1,}', r"not JSON: JSON is malformed: trailing comma in object \(byte 13\)"),
        (b"[" * 100_000, "nested too deeply"),
        (b'["\\ud83d"]', "not JSON: half of a surrogate pair"),
        (b'["\\ud83d\\u0041"]', "not JSON: half of a surrogate pair"),
    ],
)
def test_what_is_wrong_with_json(data: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        parse_json(data, "it")
    assert "secret" not in str(refused.value)


def test_half_a_surrogate_pair_is_not_text() -> None:
    assert check_text("🦄\0", "it") == "🦄\0"
    for text in ("\ud83d", "r\udce9sultat"):
        with pytest.raises(ConfigError, match="it is not UTF-8"):
            check_text(text, "it")


def test_json_is_one_line_for_any_reader() -> None:
    line = json_line({"text": EVERYTHING, "número": 1})
    assert len(line.splitlines()) == 1
    assert line.encode().decode() == line
    assert json.loads(line)["text"] == json.loads(json.dumps(EVERYTHING))
    assert '"número": 1' in line
    assert for_terminal(line) == line


def test_a_terminal_obeys_nothing_but_line_breaks_and_tabs() -> None:
    kept = for_terminal(EVERYTHING)
    assert [char for char in kept if unicodedata.category(char) == "Cc"] == ["\t", "\n"]
    assert len(EVERYTHING) - len(kept) == 65 - 2
    assert for_terminal("a\x1b]52;c;Zm9v\x07b\x9b2Jc\r\n") == "a]52;c;Zm9vb2Jc\n"


ENCODINGS = pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])


def stdout_of(encoding: str, monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """Makes stdout one of an encoding; returns the bytes that go there."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, newline=""))
    console.prepare_output()
    return written


@ENCODINGS
def test_every_text_can_be_printed(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = stdout_of(encoding, monkeypatch)
    console.print_text("naïve 你 🦄 r\udce9")
    printed = output.getvalue().decode(encoding)
    expected = {
        "utf-8": "naïve 你 🦄",
        "latin-1": "naïve \\u4f60 \\U0001f984",
        "ascii": "na\\xefve \\u4f60 \\U0001f984",
    }
    assert printed == f"{expected[encoding]} r\\udce9\n"


@ENCODINGS
def test_json_is_valid_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = stdout_of(encoding, monkeypatch)
    facts = {"text": "naïve 你 🦄 \x85\u2028", "output": "r\udce9sultat"}
    console.emit_json(facts)
    assert json.loads(output.getvalue()) == facts
    assert output.getvalue().count(b"\n") == 1


def test_tables_and_notices_control_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    output = stdout_of("utf-8", monkeypatch)
    table = Table("naïve", "b\x1b]0;title\x07")
    table.add_row("[bold]", "c\x9b2J")
    console.stdout().print(table, "d\x1b[2J")
    printed = output.getvalue().decode()
    assert for_terminal(printed) == printed
    assert all(word in printed for word in ("naïve", "b]0;title", "[bold]", "c2J", "d[2J"))


def test_a_closed_stdout_takes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    console.prepare_output()
    console.emit_json({})
    sys.stdout.close()


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    def stdin(data: bytes, encoding: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding=encoding))

    for encoding in ("utf-8", "ascii"):
        stdin("naïve\r\n".encode("utf-8-sig"), encoding)
        assert console.read_stdin() == "naïve\r\n"
    stdin("naïve".encode("latin-1"), "latin-1")
    assert console.read_stdin() == "naïve"
    stdin("naïve".encode("latin-1"), "utf-8")
    with pytest.raises(ConfigError, match="stdin is not UTF-8"):
        console.read_stdin()


def test_only_a_line_feed_ends_a_line_of_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\ufeffone \r\n\ntwo\x0bthree\x85four\u2028five\rsix\nno \0"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
    lines = console.piped_lines()
    assert [next(lines) for _ in range(3)] == ["one", "", "two\x0bthree\x85four\u2028five\rsix"]
    with pytest.raises(ConfigError, match="line 4 of stdin is not text: it has a NUL byte"):
        next(lines)

"""`lambda-split ping`: what it prints, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from fleet import serving_here
from split_device.cli.ping import Row, recommended

pytestmark = pytest.mark.usefixtures("patient_queue")


@pytest.mark.parametrize(
    ("text", "refusal"),
    [(None, "cannot read"), ("\n \n", "has 0 prompts"), ("why?\n" * 17, "has 17 prompts"), ("x" * 2**21, "bytes")],
)
def test_a_sample_is_a_few_prompts(run: Any, tmp_path: Path, text: str | None, refusal: str) -> None:
    path = tmp_path / "sample.txt"
    if text is not None:
        path.write_text(text)
    done = run("ping", "--sample", path, "--json")
    assert done.code == 2
    assert done.json["error"]["type"] == "ConfigError"
    assert refusal in done.json["error"]["message"]


def row(speculate: str, codec: str, rate: float, sessions: int = 1) -> Row:
    return Row(speculate, codec, sessions, rate, 1.0, codec in ("exact", "lossless"))


def test_the_recommended_setting_changes_no_token_and_is_plain_if_that_costs_little() -> None:
    def best(*rows: Row) -> tuple[str, str]:
        found = recommended(rows)[1]
        return found.speculate, found.codec

    assert best(row("off", "exact", 10), row("auto", "exact", 9.9), row("ngram", "int8", 30)) == ("auto", "exact")
    assert best(row("auto", "exact", 10), row("suffix", "exact", 12)) == ("suffix", "exact")
    # Another codec only if no drafter alone is as good.
    assert best(row("auto", "exact", 10), row("ngram", "exact", 19.5), row("ngram", "lossless", 20)) == (
        "ngram",
        "exact",
    )
    assert best(row("auto", "exact", 10), row("ngram", "exact", 12), row("ngram", "lossless", 20)) == (
        "ngram",
        "lossless",
    )
    both = recommended([row("auto", "exact", 10), row("off", "exact", 70, 16), row("auto", "exact", 60, 16)])
    assert [(each.speculate, each.sessions) for each in both.values()] == [("auto", 1), ("off", 16)]


@pytest.mark.long
def test_ping_prints_what_it_measures_predicts_and_recommends(run: Any, tmp_path: Path) -> None:
    checkpoint = tiny.save_tokenizer(tiny.save("llama", tmp_path / "tiny", max_position_embeddings=1024))
    (sample := tmp_path / "sample.txt").write_text("abc abc abc\nWhat?\n")
    with serving_here(checkpoint) as address:
        options = ["--model", checkpoint, "--broker", address, "--sample", sample]
        found = run("ping", *options, "--json").json
        shown = run("ping", *options)
    assert found["notes"] == []
    assert found["sample"]["prompts"] <= 2
    settings = {(each["speculate"], each["codec"], each["sessions"]): each for each in found["settings"]}
    # Four without trees for 1, 2, 4, 8 and 16 sessions, and two with trees for 1, 2 and 4; four codecs.
    assert len(settings) == (4 * 5 + 2 * 3) * 4
    for sessions, best in found["recommended"].items():
        assert settings[best["speculate"], best["codec"], int(sessions)] == best
        assert best["exact"] is True
    for spread in (
        found["round_trip_ms"],
        *found["worker_ms"].values(),
        found["cycle_ms"]["speculating"]["16"]["4"],
        found["cycle_ms"]["trees"]["4"]["33"],
    ):
        assert 0 < spread["low"] <= spread["mean"] <= spread["high"]
        assert spread["samples"] >= 4
    assert shown.code == 0
    for expected in (
        "round trip",
        "speculating, 16 × 4",
        "suffix",
        "recommended for one session: --speculate",
    ):
        assert expected in shown.out
    assert "measuring bandwidth …" in shown.err


@pytest.mark.long
def test_a_model_that_cannot_take_tokens_back_is_measured_without_drafts(run: Any, tmp_path: Path) -> None:
    checkpoint = tiny.save_tokenizer(tiny.save("lfm2", tmp_path / "tiny", max_position_embeddings=1024))
    with serving_here(checkpoint) as address:
        found = run("ping", "--model", checkpoint, "--broker", address, "--json").json
    assert {each["speculate"] for each in found["settings"]} == {"off"}
    assert found["cycle_ms"]["speculating"] == found["cycle_ms"]["trees"] == {}
    assert list(found["cycle_ms"]["off"]["16"]) == ["1"]

"""docs/models.md: it has all types that transformers knows, and what it says of some is tried again."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.structures import causal_types, image_text_types
from benchmarks.survey_page import PAGE, merged, page, results, summary

#: The tables of a page.
KINDS = ("causal", "image_text")
#: Seconds that a type may take; usual are a few.
LIMIT = 900.0


def survey(names: list[str] | None, limit: float = LIMIT) -> Any:
    """What the command finds of types, or of all."""
    only = [] if names is None else ["--only", ",".join(names)]
    command = [sys.executable, "-m", "benchmarks.survey", "--json", "--limit", str(limit), *only]
    done = subprocess.run(command, cwd=PAGE.parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_page_is_what_is_written_and_has_all_types_and_no_fault() -> None:
    text = PAGE.read_text()
    said = results(text)
    assert page(said) == text, "python -m benchmarks.survey --write makes the page again"
    assert {kind: sorted(said[kind]) for kind in KINDS} == {
        "causal": sorted(causal_types()),
        "image_text": sorted(image_text_types()),
    }, "python -m benchmarks.survey --write makes the page again"
    assert not {"wrong", "error", "hang"} & {each["verdict"] for kind in KINDS for each in said[kind].values()}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["llama", "bert"], marks=pytest.mark.long),
        pytest.param(sorted(random.Random(0).sample(causal_types(), 3)), marks=pytest.mark.long),
        pytest.param(None, marks=pytest.mark.nightly),
    ],
    ids=["some", "many", "all"],
)
def test_the_page_says_what_is_so(names: list[str] | None) -> None:
    found, said = survey(names), results(PAGE.read_text())
    fields = ("verdict", "layers", "at_once")
    for kind in KINDS:
        for name, outcome in found[kind].items():
            # Pages say of some types only that this was not tried.
            expected = [said[kind][name][field] or outcome[field] for field in fields]
            assert [outcome[field] for field in fields] == expected, f"{name}: benchmarks.survey --write"


def outcome(verdict: str, **fields: Any) -> dict[str, Any]:
    usual = {"reason": "", "layers": "", "refused": {}, "unsplit_fails": {}, "at_once": False}
    return {"verdict": verdict, **usual, **fields}


def test_a_page_is_read_as_it_was_written() -> None:
    refused = {"left padding": "it | `differs` <here> [1] " + "x" * 200, "logits": "y" * 200}
    found = {
        "transformers": "5.1",
        "causal": {
            "a": outcome("packed", layers="2:6", refused=refused, at_once=True),
            "b-1.5": outcome("wrong", reason="greedy differs"),
        },
        "image_text": {"c_d": outcome("one at a time", reason="no registered attention")},
    }
    text = page(found)
    said = results(text)
    assert page(said) == text
    assert said["transformers"] == "5.1"
    assert {name: each["verdict"] for name, each in said["causal"].items()} == {"a": "packed", "b-1.5": "wrong"}
    assert "| a | yes with --layers 2:6 | same | refused: left padding (it / differs &lt;here>" in text
    assert "| Language models | 2 | 1 | 0 | 1 |" in text
    assert "b-1.5: wrong: greedy differs" in summary(found)
    again = page(merged(said, {"causal": {"b-1.5": outcome("refused", reason="odd")}, "image_text": {}}))
    assert "| b-1.5 | no | – | odd |" in again
    assert [line for line in again.splitlines() if line.startswith("| a |")] == [
        line for line in text.splitlines() if line.startswith("| a |")
    ]


@pytest.mark.long
def test_a_type_that_hangs_or_dies_is_reported() -> None:
    found = survey(["llama"], limit=0.01)
    assert found["causal"]["llama"]["verdict"] == "hang"

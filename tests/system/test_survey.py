"""docs/models.md: it has all types that transformers knows, and what it says of some is tried again."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.structures import causal_types, image_text_types
from benchmarks.survey_page import PAGE, page, summary, verdicts

#: Seconds that a type may take; usual are a few.
LIMIT = 900.0


def survey(names: list[str] | None, limit: float = LIMIT) -> Any:
    """What the command finds of types, or of all."""
    only = [] if names is None else ["--only", ",".join(names)]
    command = [sys.executable, "-m", "benchmarks.survey", "--json", "--limit", str(limit), *only]
    done = subprocess.run(command, cwd=PAGE.parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_page_has_all_types_and_no_fault() -> None:
    said = verdicts(PAGE.read_text())
    assert {kind: sorted(types) for kind, types in said.items()} == {
        "causal": sorted(causal_types()),
        "image_text": sorted(image_text_types()),
    }, "python -m benchmarks.survey --write makes the page again"
    assert not {"wrong", "error", "hang"} & {verdict for types in said.values() for verdict in types.values()}


@pytest.mark.parametrize(
    "names",
    [
        ["llama", "bert"],
        pytest.param(sorted(random.Random(0).sample(causal_types(), 8)), marks=pytest.mark.long),
        pytest.param(None, marks=pytest.mark.nightly),
    ],
    ids=["some", "many", "all"],
)
def test_the_page_says_what_is_so(names: list[str] | None) -> None:
    found = survey(names)
    said = verdicts(PAGE.read_text())
    for kind in said:
        differ = {name: out for name, out in found[kind].items() if out["verdict"] != said[kind][name]}
        assert not differ, "python -m benchmarks.survey --write makes the page again"


def outcome(verdict: str, **fields: Any) -> dict[str, Any]:
    return {"verdict": verdict, "reason": "", "layers": "", "refused": {}, "unsplit_fails": {}, **fields}


def test_a_page_is_read_as_it_was_written() -> None:
    found = {
        "transformers": "5",
        "causal": {
            "a": outcome("packed", layers="2:6", refused={"left padding": "it | `differs` <here>"}),
            "b-1.5": outcome("wrong", reason="greedy differs"),
        },
        "image_text": {"c_d": outcome("one at a time", reason="no registered attention")},
        "counts": {"causal": {"packed": 1, "wrong": 1}, "image_text": {"one at a time": 1}},
    }
    text = page(found)
    assert verdicts(text) == {
        "causal": {"a": "packed", "b-1.5": "wrong"},
        "image_text": {"c_d": "one at a time"},
    }
    assert "| a | yes with --layers 2:6 | refused: left padding (it / differs &lt;here>) |" in text
    assert "b-1.5: wrong: greedy differs" in summary(found)


@pytest.mark.long
def test_a_type_that_hangs_or_dies_is_reported() -> None:
    found = survey(["llama"], limit=0.01)
    assert found["causal"]["llama"]["verdict"] == "hang"

"""Where a worker lets tokens of images be: positions on several axes, and spans that attend both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
import tiny_vision
from split_common.errors import Malformed
from split_common.models.loading import read_spec
from split_common.models.split import Split
from split_common.protocol import payloads
from split_common.protocol.capabilities import POSITION_AXES, SPANS
from split_worker.bodies.language import LanguageBody, Rows
from split_worker.bodies.loading import load_language_body

PLACES = frozenset({POSITION_AXES, SPANS})


def loaded(checkpoint: Path) -> LanguageBody:
    spec = read_spec(str(checkpoint))
    return load_language_body(spec, Split.from_head_tail(spec.layers, 1, 1), torch.device("cpu"), kv_bytes=1 << 20)


@pytest.mark.parametrize(
    ("kind", "has"),
    [
        ("llama", set()),
        ("gemma3_text", set()),
        ("llava", set()),
        ("gemma3", {SPANS}),
        ("qwen3_vl", {POSITION_AXES}),
    ],
)
def test_a_worker_names_what_its_model_has(tmp_path: Path, kind: str, has: set[str]) -> None:
    """What no mask of the model shows is refused, because it would only be slow."""
    save = tiny_vision.save if kind in tiny_vision.KINDS else tiny.save
    assert loaded(save(kind, tmp_path)).lacks & PLACES == PLACES - has


@pytest.fixture(scope="module")
def spanned(tmp_path_factory: pytest.TempPathFactory) -> LanguageBody:
    return loaded(tiny_vision.save("gemma3", tmp_path_factory.mktemp("gemma3")))


def placed(*spans: payloads.Span) -> payloads.PlacedStep:
    return payloads.PlacedStep("float32", 32, [payloads.Run(0, 0, [0, 1, 2])], spans=list(spans))


def test_a_span_within_a_run(spanned: LanguageBody) -> None:
    Rows().check(placed(payloads.Span(0, 1, 2)), spanned.runner)


@pytest.mark.parametrize(
    "spans",
    [
        [payloads.Span(1, 0, 2)],
        [payloads.Span(0, 2, 2)],
        [payloads.Span(0, 2**40, 2)],
        [payloads.Span(0, 0, 2), payloads.Span(0, 1, 2)],
    ],
    ids=["of a row that is not there", "beyond the run", "far beyond", "overlapping"],
)
def test_a_span_that_does_not_fit(spanned: LanguageBody, spans: list[payloads.Span]) -> None:
    with pytest.raises(Malformed, match="not part of one run, or overlaps"):
        Rows().check(placed(*spans), spanned.runner)

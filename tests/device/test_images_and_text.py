"""Models that see images: the same tokens as unsplit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_vision
from fleet import joined, running_broker
from split_common.errors import UnsupportedFeature

pytestmark = pytest.mark.numbers

Model = Any

#: Two prompts of text, of which the second one is shorter.
TEXTS = torch.tensor([[5, 17, 33, 4, 61, 12, 80, 7, 29, 44, 3], [0, 0, 0, 4, 61, 12, 80, 7, 30, 8, 9]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "suppress_tokens": [0, *range(90, 97)]}


@pytest.fixture(scope="module", params=tiny_vision.KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Model]]:
    """A model, and the same model split."""
    checkpoint = tiny_vision.save(request.param, tmp_path_factory.mktemp(request.param))
    with running_broker() as broker, joined(broker.address, checkpoint) as (split, _):
        yield tiny_vision.build(request.param), split


def test_texts(both: tuple[Model, Model]) -> None:
    """A padded batch, beams, and the logits."""
    mask = (TEXTS != 0).long()
    for more in ({}, {"num_beams": 3}):
        expected, output = (model.generate(TEXTS, attention_mask=mask, **GREEDY, **more) for model in both)
        assert output.tolist() == expected.tolist()
    with torch.no_grad():
        expected, output = (model(TEXTS, attention_mask=mask).logits[mask.bool()] for model in both)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_masks_that_do_not_follow_from_the_padding(tmp_path: Path) -> None:
    checkpoint = tiny_vision.save("gemma3", tmp_path)
    with running_broker() as broker, joined(broker.address, checkpoint) as (split, worker):
        text = split.model.language_model
        states = torch.zeros(1, 4, 32)
        masks = {kind: torch.ones(1, 1, 4, 4, dtype=torch.bool) for kind in ("full_attention", "sliding_attention")}
        with pytest.raises(UnsupportedFeature, match="depend on what the tokens are"):
            text(inputs_embeds=states, attention_mask=masks)
        assert worker.facts()["steps"] == 0

"""Models that see images: the same tokens as unsplit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LogitsProcessor, LogitsProcessorList

import tiny
import tiny_vision
from fleet import joined, running_broker, serving_here
from split_common.cli.application import main
from split_common.engine import forward_times, scheduler
from split_common.errors import UnsupportedArchitecture, UnsupportedFeature
from split_common.protocol import payloads
from split_device import SplitModelForImageTextToText
from split_device.models.body import generating
from split_device.sessions import chunks, history
from wiretap import record_requests

Model = Any

#: Two prompts of text, of which the second one is shorter.
TEXTS = torch.tensor([[5, 17, 33, 4, 61, 12, 80, 7, 29, 44, 3], [0, 0, 0, 4, 61, 12, 80, 7, 30, 8, 9]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "suppress_tokens": [0, *range(90, 97)]}


#: Kinds that the shorter tests run: a plain one, one with spans, and one with positions on several axes.
FIRST = ("llava", "gemma3", "qwen3_vl")


@pytest.fixture(
    scope="module",
    params=[kind if kind in FIRST else pytest.param(kind, marks=pytest.mark.long) for kind in tiny_vision.KINDS],
)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Model]]:
    """A model, and the same model split."""
    checkpoint = tiny_vision.save(request.param, tmp_path_factory.mktemp(request.param))
    with (
        serving_here(checkpoint) as broker,
        SplitModelForImageTextToText.from_pretrained(checkpoint, broker=broker) as split,
    ):
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


@pytest.mark.numbers
def test_images(both: tuple[Model, Model]) -> None:
    """Two images in one row and one in another, which is padded: tokens, beams, and logits."""
    full, _ = both
    given = tiny_vision.inputs(full.config.model_type)
    for more in ({}, {"num_beams": 3}):
        expected, output = (model.generate(**given, **GREEDY, **more) for model in both)
        assert output.tolist() == expected.tolist()
    with torch.no_grad():
        expected, output = (model(**given).logits[given["attention_mask"].bool()] for model in both)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_turns_with_images(both: tuple[Model, Model]) -> None:
    """A second turn brings another image."""
    full, _ = both
    first, second = (tiny_vision.inputs(full.config.model_type, 1, seed=seed) for seed in (1, 2))
    outputs = []
    for model in both:
        answer = model.generate(**row(first), **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([answer.sequences, row(second)["input_ids"]], 1)
        marks = {
            name: torch.cat([row(first)[name], torch.zeros(1, 10, dtype=torch.long), row(second)[name]], 1)
            for name in first
            if name.endswith("token_type_ids")
        }
        images = {
            name: torch.cat([row(first)[name], row(second)[name]])
            for name in first
            if name not in ("input_ids", "attention_mask", *marks)
        }
        outputs.append(
            model.generate(ids, attention_mask=torch.ones_like(ids), **images, **marks, **GREEDY).tolist()
        )
    assert outputs[0] == outputs[1]


def row(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of the second row alone, which has one image, without padding."""
    kept = given["attention_mask"][1].bool()
    images = len(given["input_ids"])
    return {
        name: tensor[1:][:, kept]
        if tensor.shape[:2] == given["input_ids"].shape
        else tensor[-len(tensor) // images :]
        for name, tensor in given.items()
    }


class Losing(LogitsProcessor):
    """Ends the session on its worker before the third and the fifth token."""

    def __init__(self, split: Model) -> None:
        self.split, self.calls, self.lost = split, 0, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls in (3, 5):
            for session in generating.get().sessions:
                session._session.close()
                self.lost += 1
        return scores


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl"])
def test_images_travel_in_chunks_and_are_replayed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a message, nor a forward, nor a block of the history ends within tokens that attend both ways."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 6 * 128)
    monkeypatch.setattr(history, "BLOCK_BYTES", 5 * 2 * 128)
    monkeypatch.setattr(forward_times, "MAX_CHUNK", 7)
    monkeypatch.setattr(scheduler, "DECODE_TOKENS", 4)
    checkpoint = tiny_vision.save(kind, tmp_path)
    given = tiny_vision.inputs(kind)
    sent = record_requests(monkeypatch)
    with running_broker() as broker, joined(broker.address, checkpoint) as (split, _):
        losing = Losing(split)
        output = split.generate(**given, **GREEDY, logits_processor=LogitsProcessorList([losing]))
        assert losing.lost == 2
        assert split.traffic["replays"] == 2
    assert output.tolist() == tiny_vision.build(kind).generate(**given, **GREEDY).tolist()
    placed = [step for step in sent if isinstance(step, payloads.PlacedStep)]
    assert any(step.spans for step in placed) == (kind == "gemma3")
    assert any(any(step.axes) for step in placed) == (kind == "qwen3_vl")
    # Three images, each sent three times, in one piece.
    assert [span.length for step in placed for span in step.spans] == ([4] * 9 if kind == "gemma3" else [])


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_head_that_is_too_short(tmp_path: Path) -> None:
    """The first two layers' outputs get features of images; texts need none."""
    checkpoint = tiny_vision.save("qwen3_vl", tmp_path)
    given = tiny_vision.inputs("qwen3_vl")
    with running_broker() as broker, joined(broker.address, checkpoint, head=1) as (split, worker):
        with pytest.raises(UnsupportedFeature, match=r"after layer 1, .* a head of at least 2 layers"):
            split.generate(**given, **GREEDY)
        assert worker.facts()["steps"] == 0
        expected = tiny_vision.build("qwen3_vl").generate(TEXTS[:1], **GREEDY)
        assert split.generate(TEXTS[:1], **GREEDY).tolist() == expected.tolist()


def test_a_model_for_texts(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    with pytest.raises(UnsupportedArchitecture, match="llama is not a decoder-only model for images and text"):
        SplitModelForImageTextToText.from_pretrained(tmp_path, broker="tcp://127.0.0.1:1")


def test_a_worker_that_is_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny_vision.save("gemma3", tmp_path)
    with running_broker() as broker, joined(broker.address, checkpoint) as (split, _):
        split.generate(TEXTS[:1], **GREEDY)
        (channel,) = split._client._channels.all()
        monkeypatch.setattr(channel.crypto, "capabilities", frozenset({"fork"}))
        with pytest.raises(UnsupportedFeature, match="does not support spans"):
            split.generate(**tiny_vision.inputs("gemma3"), **GREEDY)


def test_masks_that_do_not_follow_from_the_padding(tmp_path: Path) -> None:
    checkpoint = tiny_vision.save("gemma3", tmp_path)
    with running_broker() as broker, joined(broker.address, checkpoint) as (split, worker):
        text = split.model.language_model
        states = torch.zeros(1, 4, 32)
        masks = {kind: torch.ones(1, 1, 4, 4, dtype=torch.bool) for kind in ("full_attention", "sliding_attention")}
        masks["full_attention"][..., 3, 1] = False
        with pytest.raises(UnsupportedFeature, match="it has to follow from a 2-D attention_mask"):
            text(inputs_embeds=states, attention_mask=masks)
        assert worker.facts()["steps"] == 0


# --- the command -------------------------------------------------------------------------------------------


def test_generate_with_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer is that of the unsplit model to what the processor makes; one photograph lies on its side."""
    checkpoint = tiny_vision.save_processor(tiny_vision.save("llava", tmp_path / "model"))
    pictures = [Image.effect_noise((24, 16), 90).convert("RGB") for _ in range(2)]
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    for picture, file, more in zip(pictures, files, ({}, {"exif": exif}), strict=True):
        picture.save(file, **more)
    pictures[1] = pictures[1].transpose(Image.Transpose.ROTATE_270)
    parts = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": "what?"}]
    inputs = AutoProcessor.from_pretrained(checkpoint).apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    expected = tiny_vision.build("llava").generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=2)
    text = AutoProcessor.from_pretrained(checkpoint).decode(
        expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    with serving_here(checkpoint) as broker:
        options = ["--model", checkpoint, "--broker", broker, "--temperature", "0", "--max-tokens", "8", "--json"]
        shown = [argument for file in files for argument in ("--show", file)]
        assert main(["generate", "what?", *map(str, (*shown, *options))]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["text"], answer["prompt_tokens"]) == (text, inputs["input_ids"].shape[1])
        assert main(["generate", "what?", "--raw", *map(str, (*shown, *options))]) == 2
        assert "--raw and --show do not go together" in capsys.readouterr().err


def test_a_model_for_texts_is_shown_no_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tiny.save_tokenizer(tiny.save("llama", tmp_path / "model"))
    picture = tmp_path / "one.png"
    Image.new("RGB", (16, 16)).save(picture)
    assert main(["generate", "what?", "--model", str(checkpoint), "--show", str(picture)]) != 0
    assert re.search("processor of .* cannot be loaded|takes no images", capsys.readouterr().err)

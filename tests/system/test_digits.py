"""The small SDXL that comes with the repository, and its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import digits
import train_digits_sdxl as trainer
from split_device.cli.demo import image as demo
from split_device.cli.demo.fleet import DemoFleet


def test_the_model_that_ships_is_small_and_in_half_precision() -> None:
    files = [path for path in demo.DIGITS_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 4
    assert {tensor.dtype for path in weights for tensor in load_file(path).values()} == {torch.float16}


def test_the_model_that_ships_draws_digits_in_colours() -> None:
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(demo.DIGITS_MODEL, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    colours = [list(digits.COLOURS)[digit % len(digits.COLOURS)] for digit in range(10)]
    pictures = pipeline(
        [digits.prompt(digit, colour) for digit, colour in enumerate(colours)],
        num_inference_steps=15,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    judge = digits.Judge(digits.drawings()[1])
    assert sum(judge.digits(pictures) == range(10)) >= 8
    assert judge.colours(pictures) == colours


def test_the_judge_knows_digits_that_it_did_not_learn_from() -> None:
    seen, held_out = digits.drawings()
    assert len(seen.ink) + len(held_out.ink) == 1797
    judge = digits.Judge(held_out)
    for name, colour in digits.COLOURS.items():
        pictures = digits.paint(seen.ink[:200], torch.tensor([colour]).expand(200, 3))
        assert (judge.digits(pictures) == seen.digits[:200].numpy()).mean() > 0.95
        assert set(judge.colours(pictures)) == {name}
    assert (judge.digits(pictures) != seen.digits[:200].flip(0).numpy()).mean() > 0.5


def test_the_demo_speaks_of_what_the_model_learnt() -> None:
    assert demo.DIGITS == digits.DIGITS
    assert tuple(digits.COLOURS) == demo.COLOURS


def lesson(checkpoint: Path, breaks: int | None = None) -> tuple[trainer.Lesson, nn.Linear]:
    """A line that learns from numbers drawn at random; Ctrl-C comes at step `breaks`."""
    torch.manual_seed(0)
    line = nn.Linear(4, 1)
    calls = 0

    def loss(chance: torch.Generator) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == breaks:
            raise KeyboardInterrupt
        numbers = torch.randn(8, 4, generator=chance)
        return (line(numbers) - numbers.sum(1, keepdim=True)).square().mean()

    return trainer.Lesson(checkpoint, nn.ModuleDict({"line": line}), 0.1, 10, 1, loss), line


def test_a_lesson_that_was_broken_off_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "KEEP_EVERY", 4)
    whole, wanted = lesson(tmp_path / "whole.pt")
    whole.learn(lambda *_: None)
    broken, _ = lesson(tmp_path / "broken.pt", breaks=8)
    with pytest.raises(KeyboardInterrupt):
        broken.learn(lambda *_: None)
    again, line = lesson(tmp_path / "broken.pt")
    assert again.step == 4
    again.learn(lambda *_: None)
    assert torch.equal(line.weight, wanted.weight)
    assert not torch.equal(line.weight, lesson(tmp_path / "new.pt")[1].weight)
    with pytest.raises(ValueError, match="another seed"):
        trainer.Lesson(
            tmp_path / "whole.pt", nn.ModuleDict({"line": line}), 0.1, 11, 1, lambda _: line.weight.sum()
        )


def test_training_saves_a_pipeline_that_is_split_and_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, held_out = digits.drawings()
    few = digits.Drawings(seen.ink[:8], seen.digits[:8]), held_out
    monkeypatch.setattr(trainer, "drawings", lambda: few)
    monkeypatch.setattr(trainer, "JUDGED_STEPS", 1)
    output = tmp_path / "made" / "digits"
    arguments = [str(output), "--vae-steps", "1", "--steps", "1", "--judged", "1", "--json"]
    assert trainer.main(arguments) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert set(result) == {"digit_accuracy", "colour_accuracy", "train_s"}
    assert sorted(path.name for path in output.parent.iterdir()) == ["digits"]
    # It is not the model that ships, but of the same shape.
    assert (output / "unet" / "config.json").read_bytes() == (
        demo.DIGITS_MODEL / "unet" / "config.json"
    ).read_bytes()


def test_bad_input_to_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("no pipeline")
    assert trainer.main([str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    with pytest.raises(SystemExit):
        trainer.main([str(tmp_path / "new"), "--steps", "0"])
    assert "--steps" in capsys.readouterr().err


@pytest.mark.numbers
def test_the_demo(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setattr(demo, "DEMO_STEPS", 2)
    monkeypatch.setattr(demo, "COLOURS", ("blue",))
    done = run("demo", "--image", "-o", tmp_path / "sheet.png", "--json")
    assert done.code == 0
    facts = done.json
    assert (facts["images"], facts["steps"]) == (10, 2)
    assert facts["max_abs_diff"] <= 1e-5
    # Of 20 rows a float32 sample of 32×4×4 up, and of 64×4×4 down.
    assert facts["bytes_sent"] > 2 * 20 * 32 * 4 * 4 * 4
    assert facts["bytes_received"] > 2 * 20 * 64 * 4 * 4 * 4
    assert facts["broker_saw"][0].startswith("REQUEST device-1/")
    with Image.open(facts["output"]) as sheet:
        assert sheet.size == (640, 64)


def test_a_step_is_shown_whole_whatever_lies_between(tmp_path: Path) -> None:
    def said(kind: str, seq: int) -> str:
        ends = ("device-1/0a", "worker-1/0b") if kind == "REQUEST" else ("worker-1/0b", "device-1/0a")
        return f"{kind} {' -> '.join(ends)}: channel 1, session 0c, seq {seq}, 104 bytes 0d…"

    lines = [said("REQUEST", 0), said("REQUEST", 1), said("REPLY", 0), said("REPLY", 1), said("REQUEST", 2)]
    log = "".join(f"2026-01-01 DEBUG split_broker.broker: routed {line}\n" for line in ["device-1 joined", *lines])
    (tmp_path / "broker.log").write_text(log)
    assert DemoFleet("", "", tmp_path).last_routed() == [said("REQUEST", 1), said("REPLY", 1)]
    (tmp_path / "broker.log").write_text("")
    assert DemoFleet("", "", tmp_path).last_routed() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "a seven"], "give only one of them"),
        (["--image", "-o", "sheet.txt"], "expected a .png file"),
        (["--image", "-o", "/no/such/sheet.png"], "/no/such is not a directory"),
    ],
)
def test_bad_input_to_the_demo(run: Any, arguments: list[str], words: str) -> None:
    done = run("demo", *arguments)
    assert done.code == 2
    assert words in done.err


def test_the_demo_without_a_clone(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DIGITS_MODEL", tmp_path / "gone")
    done = run("demo", "--image")
    assert done.code == 2
    assert "clone" in done.err


def test_a_language_command_names_what_images_have(run: Any) -> None:
    done = run("inspect", demo.DIGITS_MODEL)
    assert (done.code, "diffusion model" in done.err) == (1, True)
    assert run("image", " ", "-o", "a.png", "--model", demo.DIGITS_MODEL).code == 2

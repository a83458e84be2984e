"""Which steps of an image call the worker, and what the others use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_diffusion import latents, pipeline

import tiny_diffusion
from fleet import running_broker, start_worker
from split_common.errors import ConfigError
from split_device import SplitUNet2DConditionModel
from split_device.models.compression import parse_reuse
from split_device.models.reuse import Base, Reuse
from split_device.sessions.images import DenoiserInputs

TEXT = torch.ones(1, 2)


class Image:
    """An image's steps, and which of them called the body: its output is its input times ten."""

    def __init__(self, reuse: float, base: Base | None = None) -> None:
        self.reuse = Reuse(reuse, base)
        self.calls: list[float] = []

    def step(self, timestep: float, states: float, text: torch.Tensor = TEXT, size: int = 1) -> float:
        def call(inputs: DenoiserInputs) -> torch.Tensor:
            self.calls.append(timestep)
            return inputs.tensors[0] * 10

        inputs = DenoiserInputs([torch.full((1, size), states), torch.zeros(1, 1)], [text])
        return float(self.reuse.output(timestep, inputs, call)[0, 0])


@pytest.mark.parametrize(("reuse", "called"), [(1, [5, 4, 3, 2, 1]), (2, [5, 3, 1]), (3, [5, 2]), (9, [5])])
def test_every_nth_step_calls(reuse: float, called: list[float]) -> None:
    image = Image(reuse)
    outputs = [image.step(time, float(time)) for time in (5, 4, 3, 2, 1)]
    assert image.calls == called
    assert outputs == [10.0 * min(call for call in called if call >= time) for time in (5, 4, 3, 2, 1)]


def test_a_step_calls_when_its_input_has_changed_enough() -> None:
    """Since the last call, not since the last step; in proportion."""
    image = Image(0.1)
    outputs = [
        image.step(time, states)
        for time, states in ((9, 100.0), (8, 106.0), (7, 110.0), (6, 110.5), (5, 100.0), (4, 99.0))
    ]
    assert image.calls == [9, 6, 4]
    assert outputs == [1000.0, 1000.0, 1000.0, 1105.0, 1105.0, 990.0]
    assert Image(0.5).step(1, 0.0) == 0.0


def test_another_image_begins_with_a_call() -> None:
    image = Image(4)
    image.step(5, 1.0)
    image.step(6, 1.0)
    image.step(6, 1.0, size=2)
    image.step(6, 1.0, text=TEXT * 2)
    assert image.calls == [5, 6, 6, 6]
    # Of a single step each.
    turbo = Image(2)
    assert [turbo.step(9, 1.0), turbo.step(9, 2.0)] == [10.0, 20.0]


def test_two_halves_of_a_guided_image_are_kept_apart() -> None:
    image = Image(2)
    outputs = []
    for time in (4, 3, 2):
        outputs += [image.step(time, float(time)), image.step(time, -float(time), text=TEXT * 2)]
    assert image.calls == [4, 4, 2, 2]
    assert outputs == [40.0, -40.0, 40.0, -40.0, 20.0, -20.0]


def test_what_is_added_to_the_input_is_reused() -> None:
    image = Image(2, base=lambda inputs: inputs.tensors[0])
    assert [image.step(2, 1.0), image.step(1, 3.0)] == [10.0, 3.0 + 9.0]


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "nan", "inf", "", "often"])
def test_what_is_neither_number_nor_threshold(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_reuse(text)


@pytest.mark.numbers
def test_a_threshold_through_a_worker(tmp_path: Path) -> None:
    """The higher, the fewer calls; the same each time; and near the image without."""
    model = tiny_diffusion.save_sdxl(tmp_path)
    wanted = latents(pipeline(model), num_inference_steps=10)
    calls: list[int] = []
    with running_broker() as broker:
        worker = start_worker(model, broker.address)
        for threshold in (1e-9, 0.1, 0.3):
            with SplitUNet2DConditionModel.from_pretrained(model, broker=broker.address, reuse=threshold) as unet:
                pipe: Any = pipeline(model, unet=unet)
                ours = latents(pipe, num_inference_steps=10)
                calls.append(unet.timings.steps)
                if threshold == 0.1:
                    assert torch.equal(latents(pipe, num_inference_steps=10), ours)
                    assert unet.timings.steps == 2 * calls[-1]
            assert torch.equal(ours, wanted) == (calls[-1] == 10)
            assert (ours - wanted).abs().mean() < 0.1 * wanted.abs().mean()
        worker.stop()
    assert 10 == calls[0] > calls[1] > calls[2] >= 2

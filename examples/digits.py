"""Pictures of handwritten digits in six colours, their prompts, and a judge of pictures.

The digits are scikit-learn's: 8×8 counts of the ink in 4×4 pixels each. One part of them is enlarged to train a
generator. The judge learns from the other part, which the generator never sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch.nn.functional import avg_pool2d, interpolate, pad

#: Width and height of a picture, and margin around a digit, in pixels.
SIZE = 32
MARGIN = 2

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.15, 0.15),
    "green": (0.15, 1.0, 0.3),
    "blue": (0.25, 0.4, 1.0),
    "yellow": (1.0, 0.9, 0.1),
    "purple": (0.75, 0.2, 1.0),
    "white": (1.0, 1.0, 1.0),
}

#: Number of pictures, of 1,797, that the judge learns from.
HELD_OUT = 600

#: Steepness of the edges of an enlarged digit: interpolated counts are smooth, strokes have edges.
SHARPNESS = 10.0


def prompt(digit: int, colour: str) -> str:
    """The prompt of a picture."""
    return f"a photo of the digit {DIGITS[digit]} in {colour}"


@dataclass(frozen=True)
class Drawings:
    """Ink `[n, SIZE, SIZE]`, from 0 to 1, and the digits `[n]` that it shows."""

    ink: torch.Tensor
    digits: torch.Tensor


def drawings() -> tuple[Drawings, Drawings]:
    """The generator's part of the digits, and the judge's."""
    found = load_digits()
    parts = train_test_split(
        found.images / 16.0, found.target, test_size=HELD_OUT, stratify=found.target, random_state=0
    )
    counts_seen, counts_held, digits_seen, digits_held = (torch.from_numpy(part) for part in parts)
    return Drawings(_draw(counts_seen), digits_seen), Drawings(_draw(counts_held), digits_held)


def _draw(counts: torch.Tensor) -> torch.Tensor:
    smooth = interpolate(counts[:, None].float(), size=SIZE - 2 * MARGIN, mode="bicubic")[:, 0]
    return pad(torch.sigmoid(SHARPNESS * (smooth - 0.5)), (MARGIN,) * 4)


def paint(ink: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Ink `[n, SIZE, SIZE]` in colours `[n, 3]`, on black: pictures `[n, 3, SIZE, SIZE]` from 0 to 1."""
    return ink[:, None] * colour[:, :, None, None]


class Judge:
    """Recognizes the digit of a picture, and its colour."""

    def __init__(self, held_out: Drawings) -> None:
        self._digits = SVC(C=10.0).fit(self._features(held_out.ink), held_out.digits)
        self._names = list(COLOURS)
        self._means = torch.tensor(list(COLOURS.values()))

    def digits(self, pictures: torch.Tensor) -> np.ndarray:
        """The digits in pictures `[n, 3, SIZE, SIZE]`, from 0 to 1. The brightest channel is taken as the ink."""
        return self._digits.predict(self._features(pictures.amax(1)))

    def colours(self, pictures: torch.Tensor) -> Sequence[str]:
        """The colours of pictures like those of `digits`: the nearest to the mean colour, weighted by ink."""
        ink = pictures.amax(1, keepdim=True)
        seen = (pictures * ink).sum((2, 3)) / ink.sum((2, 3)).clamp(min=1e-6)
        seen = seen / seen.amax(1, keepdim=True).clamp(min=1e-6)
        return [self._names[index] for index in torch.cdist(seen, self._means).argmin(1)]

    @staticmethod
    def _features(ink: torch.Tensor) -> np.ndarray:
        return avg_pool2d(ink[:, None].float(), SIZE // 8).flatten(1).numpy()

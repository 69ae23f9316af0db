"""Embedded images to fine-tune on: the real digits in scikit-learn, each placed among pieces of others."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_apvit.finetuning.data import Samples, Splits

# The test digits are the same whatever the seed of a run, so that no run is tested on digits another was trained on.
SPLIT_SEED = 0
TEST_FRACTION = 0.2


class ClutteredDigits(Samples):
    """Real digits at random places and sizes among pieces of other digits: ``digits[index]`` -> ``(C, H, W)``, label.

    The task is to find the one whole digit and to read it. Detail is sparse: the digit covers a small part of it,
    and the pieces around it are made of the same strokes.

    Args:
        digits: ``(n, 8, 8)`` in [0, 1].
        labels: ``(n,)``.
        length: the number of samples of an epoch.
        seed: of the samples, with the epoch and the index.
        input_size: C, H and W of an image; the digit is repeated over channels.
        mean: of each channel, subtracted.
        std: of each channel, divided by.
        sides: the smallest and the largest side of a digit, as fractions of the image's shorter side.
        pieces: the number of pieces of other digits.
        cut: the side of a piece, as a fraction of its digit's. Cluttered MNIST has 8 of 28 pixels.
        brightness: the least and the greatest factor on a piece's values.
    """

    def __init__(
        self,
        digits: NDArray[np.float32],
        labels: NDArray[np.int64],
        length: int,
        seed: int,
        input_size: tuple[int, int, int],
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        sides: tuple[float, float] = (0.3, 0.5),
        pieces: int = 6,
        cut: float = 0.3,
        brightness: tuple[float, float] = (0.2, 0.8),
    ) -> None:
        super().__init__(length, seed)
        self.digits = digits
        self.labels = labels
        self.input_size = input_size
        channels = input_size[0]
        self.mean, self.std = (torch.tensor((tuple(v) * channels)[:channels]).view(-1, 1, 1) for v in (mean, std))
        self.sides = sides
        self.pieces = pieces
        self.cut = cut
        self.brightness = brightness

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng((self.seed, self.epoch, index))
        chosen = rng.integers(len(self.digits), size=self.pieces + 1).tolist()
        # Of each: the digit's side, where a piece is cut out of it, where it goes on the canvas, its brightness.
        draws = rng.random((self.pieces + 1, 6)).tolist()
        canvas: NDArray[np.float32] = np.zeros(self.input_size[1:], np.float32)
        for n, (digit, draw) in enumerate(zip(chosen, draws, strict=True)):
            if n == self.pieces:
                self._paint(canvas, self.digits[digit], draw, cut=1.0)
            else:
                darkest, brightest = self.brightness
                brightness = darkest + draw[5] * (brightest - darkest)
                self._paint(canvas, brightness * self.digits[digit], draw, self.cut)
        image = torch.from_numpy(canvas).expand(self.input_size)
        return (image - self.mean) / self.std, int(self.labels[chosen[-1]])

    def _paint(self, canvas: NDArray[np.float32], digit: NDArray[np.float32], draw: list[float], cut: float) -> None:
        """Paint a window of a digit, ``cut`` of its side, wholly inside the canvas; the brighter pixels stay."""
        smallest, largest = (limit * min(canvas.shape) for limit in self.sides)
        side = max(1, round(smallest + draw[0] * (largest - smallest)))
        window = math.ceil(side * cut)
        weights = _enlarging_weights(side)
        top, left = (int(u * (side - window + 1)) for u in draw[1:3])
        piece = weights[top : top + window] @ digit @ weights[left : left + window].T
        y, x = (int(u * (length - window + 1)) for u, length in zip(draw[3:5], canvas.shape, strict=True))
        target = canvas[y : y + window, x : x + window]
        np.maximum(target, piece, out=target)


@lru_cache(maxsize=1024)
def _enlarging_weights(side: int) -> NDArray[np.float32]:
    """Interpolate bilinearly from 8 pixels, over pixel edges: ``(side, 8)``."""
    centres = (np.arange(side) + 0.5) * 8 / side - 0.5
    return np.stack([np.interp(centres, np.arange(8), row) for row in np.eye(8)], axis=1).astype(np.float32)


def load_embedded_digits(
    seed: int,
    input_size: tuple[int, int, int],
    length: int = 8_000,
    test_length: int = 1_000,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
) -> Splits:
    """Make cluttered digits out of scikit-learn's 1,797 real ones, a fifth of which are kept for the test.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        message = "the embedded digits need scikit-learn: pip install 'timm-apvit[finetune]', or give DATA"
        raise ModuleNotFoundError(message) from None
    digits = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits.images))
    n_test = round(TEST_FRACTION * len(order))

    def split(chosen: NDArray[np.int64], n: int, seed: int) -> ClutteredDigits:
        images, labels = digits.images[chosen].astype(np.float32) / 16, digits.target[chosen].astype(np.int64)
        return ClutteredDigits(images, labels, n, seed, input_size, mean, std)

    names = tuple(str(name) for name in digits.target_names)
    return Splits(split(order[n_test:], length, seed), split(order[:n_test], test_length, SPLIT_SEED), names)

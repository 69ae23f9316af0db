"""Objects at random places and sizes among pieces of others: detail is sparse, and what matters has to be found."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_apvit.finetuning.samples import Samples

# Of an object: y and x of its top left corner and its side, in pixels.
Box = tuple[int, int, int]


class Clutter(NamedTuple):
    """How objects lie on a canvas.

    Attributes:
        sides: the smallest and the largest side of an object, as fractions of the canvas's shorter side.
        pieces: the number of pieces of other objects.
        cut: the side of a piece, as a fraction of its object's. Cluttered MNIST (Mnih et al. 2014) has 8 of 28 pixels.
        brightness: the least and the greatest factor on a piece's values.
    """

    sides: tuple[float, float] = (0.3, 0.5)
    pieces: int = 6
    cut: float = 0.3
    brightness: tuple[float, float] = (0.2, 0.8)


class ClutteredObjects(Samples):
    """Objects at random places and sizes among pieces of others: ``samples[index]`` -> ``(C, H, W)``, label.

    The task is to find the one whole object and to name it. Detail is sparse: the object covers a small part of the
    canvas, and the pieces around it are made of the same strokes.

    Args:
        objects: square grey images ``(n, s, s)`` in [0, 1].
        labels: ``(n,)``.
        length: the number of samples of an epoch.
        seed: of the samples, with the epoch and the index.
        input_size: C, H and W of an image; the object is repeated over channels.
        mean: of each channel, subtracted.
        std: of each channel, divided by.
        clutter: how the objects lie on the canvas.
    """

    def __init__(
        self,
        objects: NDArray[np.float32],
        labels: NDArray[np.int64],
        length: int,
        seed: int,
        input_size: tuple[int, int, int],
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        clutter: Clutter = Clutter(),  # noqa: B008  immutable
    ) -> None:
        super().__init__(length, seed)
        self.objects = objects
        self.labels = labels
        self.input_size = input_size
        channels = input_size[0]
        self.mean, self.std = (torch.tensor((tuple(v) * channels)[:channels]).view(-1, 1, 1) for v in (mean, std))
        self.clutter = clutter

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        canvas, label, _ = self.compose(index)
        return self.normalise(canvas), label

    def normalise(self, canvas: NDArray[np.float32]) -> Tensor:
        """Give grey values ``(H, W)`` in [0, 1] to a model: ``(C, H, W)``."""
        return (torch.from_numpy(canvas)[None].expand(self.input_size[0], -1, -1) - self.mean) / self.std

    def compose(self, index: int) -> tuple[NDArray[np.float32], int, Box]:
        """Canvas ``(H, W)`` of grey values in [0, 1], its label, and where the object lies."""
        rng = np.random.default_rng((self.seed, self.epoch, index))
        pieces = self.clutter.pieces
        chosen = rng.integers(len(self.objects), size=pieces + 1).tolist()
        # Of each: the object's side, where a piece is cut out of it, where it goes on the canvas, its brightness.
        draws = rng.random((pieces + 1, 6)).tolist()
        canvas: NDArray[np.float32] = np.zeros(self.input_size[1:], np.float32)
        darkest, brightest = self.clutter.brightness
        for number, draw in zip(chosen[:pieces], draws[:pieces], strict=True):
            brightness = darkest + draw[5] * (brightest - darkest)
            self._paint(canvas, brightness * self.objects[number], draw, self.clutter.cut)
        box = self._paint(canvas, self.objects[chosen[-1]], draws[-1], cut=1.0)
        return canvas, int(self.labels[chosen[-1]]), box

    def _paint(self, canvas: NDArray[np.float32], image: NDArray[np.float32], draw: list[float], cut: float) -> Box:
        """Paint a window of an object, ``cut`` of its side, wholly inside the canvas; the brighter pixels stay."""
        smallest, largest = (limit * min(canvas.shape) for limit in self.clutter.sides)
        side = max(1, round(smallest + draw[0] * (largest - smallest)))
        window = math.ceil(side * cut)
        weights = enlarging_weights(side, image.shape[0])
        top, left = (int(u * (side - window + 1)) for u in draw[1:3])
        piece = weights[top : top + window] @ image @ weights[left : left + window].T
        y, x = (int(u * (length - window + 1)) for u, length in zip(draw[3:5], canvas.shape, strict=True))
        target = canvas[y : y + window, x : x + window]
        np.maximum(target, piece, out=target)
        return y, x, window


@lru_cache(maxsize=1024)
def enlarging_weights(side: int, source: int) -> NDArray[np.float32]:
    """Interpolate bilinearly from ``source`` pixels, over pixel edges: ``(side, source)``."""
    centres = (np.arange(side) + 0.5) * source / side - 0.5
    return np.stack([np.interp(centres, np.arange(source), row) for row in np.eye(source)], axis=1).astype(np.float32)

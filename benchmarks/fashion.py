"""The benchmark's images: Fashion-MNIST, alone on a canvas or among pieces of other objects.

Fashion-MNIST (Xiao et al. 2017) is read from IDX files: those of Debian's package `dataset-fashion-mnist`, those in a
folder, or those that torchvision downloads. Its own split into 60,000 training and 10,000 test images holds.
"""

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from timm_apvit.finetuning.clutter import Clutter, ClutteredObjects, enlarging_weights
from timm_apvit.finetuning.data import Samples, Splits

DEBIAN = Path('/usr/share/datasets/fashion-mnist')
NAMES = ('t-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle boot')
# The test set is one and the same in all runs.
TEST_SEED = 0
# Of the values of an image: most of a canvas is black.
MEAN, STD = 0.1, 0.3


class Task(NamedTuple):
    """What is to be learnt.

    Attributes:
        side: of the image, in pixels.
        channels: of the image.
        clutter: how the objects lie; None: an object alone fills the canvas.
        test_images: of the fixed test set.
    """

    side: int
    channels: int
    clutter: Clutter | None
    test_images: int


# An object covers 1.6 to 14 % of the canvas, 6.8 % on average; pieces are those of cluttered MNIST, 8 of 28 pixels.
_CLUTTER = Clutter(sides=(0.125, 0.375), pieces=8, cut=8 / 28, brightness=(1.0, 1.0))
TASKS = {
    'cluttered': Task(112, 1, _CLUTTER, 5_000),
    'clean': Task(112, 1, None, 5_000),
    'pretrained': Task(224, 3, _CLUTTER, 1_000),
}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file, gzipped or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
    dimensions = data[3]
    shape = np.frombuffer(data, '>u4', count=dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def load_fashion(folder: Path | None, train: bool) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images ``(n, 28, 28)`` in [0, 1] and labels ``(n,)``; without a folder Debian's, or else torchvision's.

    Raises:
        FileNotFoundError: the folder does not hold the files.
    """
    prefix = 'train' if train else 't10k'
    if folder is None and DEBIAN.is_dir():
        folder = DEBIAN
    if folder is None:
        from torchvision.datasets import FashionMNIST

        dataset = FashionMNIST(Path.home() / '.cache' / 'fashion-mnist', train=train, download=True)
        return dataset.data.numpy().astype(np.float32) / 255, dataset.targets.numpy()
    found = []
    for kind in ('images-idx3-ubyte', 'labels-idx1-ubyte'):
        paths = [folder / f'{prefix}-{kind}{suffix}' for suffix in ('.gz', '')]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(f'expected {paths[0].name} in {str(folder)!r}, got no such file')
        found.append(read_idx(path))
    return found[0].astype(np.float32) / 255, found[1].astype(np.int64)


class CleanObjects(ClutteredObjects):
    """Objects alone, each filling the canvas."""

    def compose(self, index: int) -> tuple[NDArray[np.float32], int, tuple[int, int, int]]:
        """Canvas, label and box, as in `ClutteredObjects`."""
        number = int(np.random.default_rng((self.seed, self.epoch, index)).integers(len(self.objects)))
        side = self.input_size[-1]
        weights = enlarging_weights(side, self.objects.shape[-1])
        return weights @ self.objects[number] @ weights.T, int(self.labels[number]), (0, 0, side)


class Crops(Samples):
    """Of each image the object's own box, resized: what patches put on the object by ground truth see.

    Args:
        source: images with objects.
        side: of a crop, in pixels.
    """

    def __init__(self, source: ClutteredObjects, side: int) -> None:
        super().__init__(len(source), source.seed)
        self.source = source
        self.side = side

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.source.epoch = self.epoch
        canvas, label, (y, x, side) = self.source.compose(index)
        crop = self.source.normalise(np.ascontiguousarray(canvas[y : y + side, x : x + side]))
        size = (self.side, self.side)
        return F.interpolate(crop[None], size, mode='bilinear', antialias=True, align_corners=False)[0], label


class Kept(Samples):
    """Samples that never differ, made once."""

    def __init__(self, source: Samples) -> None:
        super().__init__(len(source), source.seed)
        pairs = [source[index] for index in range(len(source))]
        self.images = torch.stack([image for image, _ in pairs])
        self.labels = [label for _, label in pairs]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def load_task(task: Task, seed: int, images: int, folder: Path | None, crop: int | None = None) -> Splits:
    """Training data of ``images`` samples an epoch, and the fixed test set; with ``crop`` the objects' own boxes."""

    def split(train: bool, length: int, seed: int) -> Samples:
        kind = CleanObjects if task.clutter is None else ClutteredObjects
        size = (task.channels, task.side, task.side)
        objects = kind(*load_fashion(folder, train), length, seed, size, (MEAN,), (STD,), task.clutter or Clutter())
        return objects if crop is None else Crops(objects, crop)

    return Splits(split(True, images, seed), Kept(split(False, task.test_images, TEST_SEED)), NAMES)

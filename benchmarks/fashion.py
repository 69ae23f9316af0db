"""The benchmark's images: Fashion-MNIST, alone on a canvas, as it is or distorted, or among pieces of other objects.

Fashion-MNIST (Xiao et al. 2017) is read from IDX files: those of Debian's package `dataset-fashion-mnist`, those in a
folder, or those that torchvision downloads. Its own split into 60,000 training and 10,000 test images holds.
"""

import gzip
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from photographs import Places
from torch import Tensor

from timm_apvit.finetuning.clutter import Clutter, ClutteredObjects, enlarging_weights
from timm_apvit.finetuning.samples import Samples, Splits

DEBIAN = Path('/usr/share/datasets/fashion-mnist')
NAMES = ('t-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle boot')
# The test set is one and the same in all runs.
TEST_SEED = 0
# Of the values of an image: most of a canvas is black.
MEAN, STD = 0.1, 0.3
# Darker pixels are no part of an object.
VISIBLE = 0.1


class Distortion(NamedTuple):
    """How an object alone is distorted; each by chance, up to what is given here.

    Attributes:
        side: of the object before it is distorted, as a fraction of the canvas's.
        rotation: either way, in degrees.
        shear: x displacement per unit of y, either way.
        perspective: share by which its denominator differs from 1 at a corner, as in the projective patches.
    """

    side: float = 0.7
    rotation: float = 0.0
    shear: float = 0.0
    perspective: float = 0.0


class Task(NamedTuple):
    """What is to be learnt.

    Attributes:
        side: of the image, in pixels.
        channels: of the image.
        clutter: how the objects lie; None: an object lies alone.
        test_images: of the fixed test set.
        distortion: of an object alone; None: it fills the canvas.
    """

    side: int
    channels: int
    clutter: Clutter | None
    test_images: int
    distortion: Distortion | None = None


# An object covers 1.6 to 14 % of the canvas, 6.8 % on average; pieces are those of cluttered MNIST, 8 of 28 pixels.
_CLUTTER = Clutter(sides=(0.125, 0.375), pieces=8, cut=8 / 28, brightness=(1.0, 1.0))
TASKS = {
    'cluttered': Task(112, 1, _CLUTTER, 5_000),
    'clean': Task(112, 1, None, 5_000),
    'pretrained': Task(224, 3, _CLUTTER, 1_000),
    # An object of half the canvas's area: what patches may turn, shear or see in perspective.
    'rotated': Task(112, 1, None, 5_000, Distortion(rotation=45.0, shear=0.5)),
    'warped': Task(112, 1, None, 5_000, Distortion(perspective=0.6)),
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


class Several(ClutteredObjects):
    """Two to six objects among pieces: ``(1, H, W)``, and what is where; where they meet the brighter pixels stay."""

    def __getitem__(self, index: int) -> tuple[Tensor, Places]:  # type: ignore[override]
        rng = np.random.default_rng((self.seed, self.epoch, index))
        number = self.clutter.pieces + int(rng.integers(2, 7))
        chosen, draws = rng.integers(len(self.objects), size=number).tolist(), rng.random((number, 6)).tolist()
        canvas = np.zeros(self.input_size[1:], np.float32)
        owner = np.zeros(canvas.shape, np.uint8)
        for order, (each, draw) in enumerate(zip(chosen, draws, strict=True), 1 - self.clutter.pieces):
            before = canvas.copy()
            self._paint(canvas, self.objects[each], draw, 1.0 if order > 0 else self.clutter.cut)
            owner[(canvas > before) & (canvas > VISIBLE)] = max(order, 0)
        mask, boxes, labels = np.zeros(canvas.shape, np.uint8), [], []
        for order, each in enumerate(chosen[self.clutter.pieces :], 1):
            rows, columns = np.nonzero(owner == order)
            if len(rows):
                mask[rows, columns] = self.labels[each] + 1
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                labels.append(int(self.labels[each]) + 1)
        found = torch.tensor(np.array(boxes, np.float32).reshape(-1, 4)), torch.tensor(labels, dtype=torch.int64)
        return self.normalise(canvas), Places(torch.from_numpy(mask), *found)


class CleanObjects(ClutteredObjects):
    """Objects alone, each filling the canvas."""

    def compose(self, index: int) -> tuple[NDArray[np.float32], int, tuple[int, int, int]]:
        """Canvas, label and box, as in `ClutteredObjects`."""
        number = int(np.random.default_rng((self.seed, self.epoch, index)).integers(len(self.objects)))
        side = self.input_size[-1]
        weights = enlarging_weights(side, self.objects.shape[-1])
        return weights @ self.objects[number] @ weights.T, int(self.labels[number]), (0, 0, side)


class DistortedObjects(ClutteredObjects):
    """Objects alone, distorted, each at a random place wholly inside the canvas.

    Args:
        distortion: how far.
        args: of `ClutteredObjects`.
    """

    def __init__(self, distortion: Distortion, *args: Any) -> None:
        super().__init__(*args)
        self.distortion = distortion

    def compose(self, index: int) -> tuple[NDArray[np.float32], int, tuple[int, int, int]]:
        """Canvas, label and box, as in `ClutteredObjects`."""
        rng = np.random.default_rng((self.seed, self.epoch, index))
        number = int(rng.integers(len(self.objects)))
        (turn, slant, rise, fall), place = rng.uniform(-1, 1, 4), rng.random(2)
        angle, shear = math.radians(self.distortion.rotation) * turn, self.distortion.shear * slant
        v = self.distortion.perspective / 2 * np.array([rise + fall, rise - fall])
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        linear = self.distortion.side * rotation @ np.array([[1, shear], [0, 1]])

        # From the object's [-1, 1]^2 to the canvas's: scaled down where it would not fit, and put in its place.
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
        outline = corners / (1 + corners @ v)[:, None] @ linear.T
        low, size = outline.min(axis=0), np.ptp(outline, axis=0)
        fit = min(1.0, 2 / size.max())
        corner = place * (2 - fit * size) - 1
        centre = corner - fit * low
        homography = np.eye(3)
        homography[:2, :2] = fit * linear + np.outer(centre, v)
        homography[:2, 2], homography[2, :2] = centre, v

        side = self.input_size[-1]
        pixels = (np.arange(side) * 2 + 1) / side - 1
        x, y = np.meshgrid(pixels, pixels)
        point = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(homography).T
        grid = torch.from_numpy((point[..., :2] / point[..., 2:]).astype(np.float32))
        image = torch.from_numpy(self.objects[number])
        canvas = F.grid_sample(image[None, None], grid[None], align_corners=False)[0, 0].numpy()
        box_side = min(side, math.ceil(fit * size.max() * side / 2))
        left, top = (min(int((a + 1) * side / 2), side - box_side) for a in corner)
        return canvas, int(self.labels[number]), (top, left, box_side)


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


def load_several(split: str, length: int, seed: int) -> Several:
    """Several objects on a canvas of 224 px, no two images alike."""
    objects, labels = load_fashion(None, split == 'train')
    return Several(objects, labels, length, seed, (1, 224, 224), (MEAN,), (STD,), _CLUTTER)


def load_task(task: Task, seed: int, images: int, folder: Path | None, crop: int | None = None) -> Splits:
    """Training data of ``images`` samples an epoch, and the fixed test set; with ``crop`` the objects' own boxes."""

    def split(train: bool, length: int, seed: int) -> Samples:
        size = (task.channels, task.side, task.side)
        args = (*load_fashion(folder, train), length, seed, size, (MEAN,), (STD,))
        if task.distortion is not None:
            objects: ClutteredObjects = DistortedObjects(task.distortion, *args)
        elif task.clutter is not None:
            objects = ClutteredObjects(*args, task.clutter)
        else:
            objects = CleanObjects(*args)
        return objects if crop is None else Crops(objects, crop)

    return Splits(split(True, images, seed), Kept(split(False, task.test_images, TEST_SEED)), NAMES)

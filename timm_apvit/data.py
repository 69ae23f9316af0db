"""Images to fine-tune on: a folder of images, or the real digits embedded in scikit-learn.

Every training sample is a function of (seed, epoch, index) and of nothing else, so that neither the number of workers nor
an interruption changes what a model sees.
"""

import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

TRAIN_FOLDERS = ('train', 'training')
TEST_FOLDERS = ('val', 'validation', 'valid', 'test', 'eval')
# Up to this many images are decoded before training starts; of more, only the headers are read.
MAX_DECODED = 20_000
# The test digits are the same whatever the seed of a run, so that no run is selected on digits another was trained on.
SPLIT_SEED = 0
TEST_FRACTION = 0.2


class Splits(NamedTuple):
    """What a model is trained and tested on.

    Attributes:
        train: samples that differ from epoch to epoch.
        test: samples that never differ.
        label_names: the name of each class.
    """

    train: 'Samples'
    test: 'Samples'
    label_names: tuple[str, ...]


def seed_from(*entropy: int) -> int:
    """Mix integers >= 0 into one 63-bit seed."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Samples(Dataset[tuple[Tensor, int]]):
    """Images ``(C, H, W)`` and labels that are a function of (seed, epoch, index).

    Args:
        length: the number of samples of an epoch.
        seed: of the samples, with the epoch and the index.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length


class SeededSamples(Samples):
    """The samples of another dataset, each transformed under a seed of its own.

    The random transforms of torchvision and timm draw from global generators, whose state depends on the worker and on what
    it loaded before. Here those generators are seeded by (seed, epoch, index) around each sample and put back afterwards.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        super().__init__(len(dataset), seed)
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        seed = seed_from(self.seed, self.epoch, index)
        # timm's augmentations use NumPy's global generator too.
        before = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            with torch.random.fork_rng(devices=[]):
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002
                torch.default_generator.manual_seed(seed)
                image, label = self.dataset[index]
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
        return image, int(label)


def create_batches(
    samples: Samples,
    epoch: int,
    batch_size: int,
    shuffle: bool = False,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[tuple[Tensor, int]]:
    """Load one epoch of batches: ``(B, C, H, W)``, ``(B,)``; the order is a function of the samples' seed and the epoch.

    A last, smaller batch is dropped when shuffling, unless it is the only one.
    """
    samples.epoch = epoch
    return DataLoader(
        samples,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=shuffle and len(samples) >= batch_size,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(seed_from(samples.seed, epoch)),
    )


# ----- a folder of images


def load_folder(
    folder: Path, seed: int, data_config: dict[str, Any], workers: int = 4, augmentation: dict[str, Any] | None = None
) -> Splits:
    """Read a folder with one sub-folder per split and in each one sub-folder per class.

    Args:
        folder: has ``train/`` and one of ``val/``, ``validation/``, ``test/``.
        seed: of the random augmentation.
        data_config: what timm's `resolve_data_config` returns for the model.
        workers: threads that check the images.
        augmentation: further arguments of timm's `create_transform`, for training.

    Raises:
        FileNotFoundError: the folder, or one of its splits, does not exist.
        ValueError: it holds no images, a single class, classes that differ between the splits, or a broken image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f'expected a folder of images, got {str(folder)!r}, which is not a folder')
    train_folder, test_folder = (_find_split(folder, names) for names in (TRAIN_FOLDERS, TEST_FOLDERS))
    mode = {1: 'L', 3: 'RGB'}.get(data_config['input_size'][0])
    if mode is None:
        raise ValueError(f'expected in_chans of 1 or 3 for image files, got {data_config["input_size"][0]}')
    train = _read_split(train_folder, mode)
    test = _read_split(test_folder, mode, train.reader.class_to_idx)
    _check_images([*train.filenames(absolute=True), *test.filenames(absolute=True)], workers)
    config = {key: data_config[key] for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')}
    train.transform = create_transform(**config, is_training=True, **(augmentation or {}))
    test.transform = create_transform(**config)
    return Splits(SeededSamples(train, seed), SeededSamples(test, seed), tuple(train.reader.class_to_idx))


def _find_split(folder: Path, names: Sequence[str]) -> Path:
    """Find the sub-folder that goes by one of these names."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    found = sorted(path.name + '/' * path.is_dir() for path in folder.iterdir())
    held = ', '.join(found[:5]) + ', ...' * (len(found) > 5) if found else 'nothing'
    raise FileNotFoundError(f'expected a folder named {" or ".join(names)} in {str(folder)!r}, got {held}')


def _read_split(folder: Path, mode: str, class_to_idx: dict[str, int] | None = None) -> Any:
    """List the images of one split as a timm dataset, classes numbered as in ``class_to_idx`` if that is given."""
    classes = {path.name for path in folder.iterdir() if path.is_dir()}
    if class_to_idx is not None and (unknown := sorted(classes - set(class_to_idx))):
        raise ValueError(f'expected the classes of the training images in {str(folder)!r}, got also {", ".join(unknown)}')
    try:
        dataset = create_dataset('', root=str(folder), search_split=False, input_img_mode=mode, class_map=class_to_idx)
    except RuntimeError:
        raise ValueError(f'expected folders of images, one for each class, in {str(folder)!r}, got no images') from None
    counts = np.bincount([label for _, label in dataset.reader.samples], minlength=len(dataset.reader.class_to_idx))
    if class_to_idx is None and len(counts) < 2:
        name = next(iter(dataset.reader.class_to_idx))
        raise ValueError(f'expected images of at least 2 classes in {str(folder)!r}, got those of {name!r} only')
    return dataset


def _check_images(paths: Sequence[str], workers: int) -> None:
    """Raise ValueError that names the broken image files, if there are any."""

    def problem(path: str) -> str:
        try:
            with Image.open(path) as image:
                image.load() if len(paths) <= MAX_DECODED else image.verify()
        # Pillow lets the errors of its decoders through: SyntaxError, struct.error, zlib.error, ...
        except Exception as error:
            return str(error) or type(error).__name__
        return ''

    with ThreadPoolExecutor(max(1, workers)) as pool:
        broken = [(path, text) for path, text in zip(paths, pool.map(problem, paths), strict=True) if text]
    if broken:
        path, text = broken[0]
        others = f' (and {len(broken) - 1} other broken files)' if len(broken) > 1 else ''
        raise ValueError(f'expected readable images, got a broken one: {path}: {text}{others}')


# ----- embedded digits


class ClutteredDigits(Samples):
    """Real digits at random places and sizes among pieces of other digits: ``digits[index]`` -> ``(C, H, W)``, label.

    The task is to find the one whole digit and to read it. Detail is sparse: the digit covers a few percent of the image, and
    the pieces around it have its strokes, so that brightness alone does not tell where it is.

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
        sides: tuple[float, float] = (0.15, 0.35),
        pieces: int = 10,
    ) -> None:
        super().__init__(length, seed)
        self.digits = digits
        self.labels = labels
        self.input_size = input_size
        channels = input_size[0]
        self.mean, self.std = (torch.tensor((tuple(v) * channels)[:channels]).view(-1, 1, 1) for v in (mean, std))
        self.sides = sides
        self.pieces = pieces

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng((self.seed, self.epoch, index))
        chosen = rng.integers(len(self.digits), size=self.pieces + 1).tolist()
        # Of each piece: its digit's side, where it is cut out of the digit, where it goes on the canvas.
        draws = rng.random((self.pieces + 1, 5)).tolist()
        canvas: NDArray[np.float32] = np.zeros(self.input_size[1:], np.float32)
        for n, (digit, draw) in enumerate(zip(chosen, draws, strict=True)):
            whole = n == self.pieces
            self._paint(canvas, self.digits[digit], draw, cut=1.0 if whole else 0.5)
        image = torch.from_numpy(canvas).expand(self.input_size)
        return (image - self.mean) / self.std, int(self.labels[chosen[-1]])

    def _paint(self, canvas: NDArray[np.float32], digit: NDArray[np.float32], draw: list[float], cut: float) -> None:
        """Paint a window of a digit, ``cut`` of its side, wholly inside the canvas; the brighter of the two stays."""
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
    length: int = 8_192,
    test_length: int = 2_000,
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
        message = "the embedded digits need scikit-learn: pip install 'timm-apvit[finetune]', or give a folder of images"
        raise ModuleNotFoundError(message) from None
    digits = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits.images))
    n_test = round(TEST_FRACTION * len(order))

    def split(chosen: NDArray[np.int64], n: int, seed: int) -> ClutteredDigits:
        images, labels = digits.images[chosen].astype(np.float32) / 16, digits.target[chosen].astype(np.int64)
        return ClutteredDigits(images, labels, n, seed, input_size, mean, std)

    names = tuple(str(name) for name in digits.target_names)
    return Splits(split(order[n_test:], length, seed), split(order[:n_test], test_length, SPLIT_SEED), names)

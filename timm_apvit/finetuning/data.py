"""Images to fine-tune on: samples, batches, and folders of images.

Every training sample is a function of (seed, epoch, index) and of nothing else, so that neither the number of workers
nor an interruption changes what a model sees.
"""

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, make_dataset

from timm_apvit.finetuning.sharing import Share, TrainingPieces

TRAIN_FOLDERS = ('train', 'training')
TEST_FOLDERS = ('val', 'validation', 'valid', 'test', 'eval')
# Up to this many images are decoded before training starts; of more, only the headers are read.
MAX_DECODED = 20_000
# The share of a process that is alone.
WHOLE = Share()


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

    The random transforms of torchvision and timm draw from global generators, whose state depends on the worker and on
    what it loaded before. Here those generators are seeded by (seed, epoch, index) around each sample and put back.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        super().__init__(len(dataset), seed)
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with seeded(seed_from(self.seed, self.epoch, index)):
            image, label = self.dataset[index]
        return image, int(label)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of the CPU, and put them back to what they were."""
    # timm's augmentations use NumPy's global generator too.
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def create_batches(
    samples: Samples,
    epoch: int,
    batch_size: int,
    shuffle: bool = False,
    workers: int = 0,
    pin_memory: bool = False,
    share: Share = WHOLE,
) -> DataLoader[tuple[Tensor, int]]:
    """Load one epoch of batches: ``(B, C, H, W)``, ``(B,)``, in an order of its own if shuffled.

    A last, smaller batch is dropped when shuffling, unless it is the only one.

    Args:
        samples: to load.
        epoch: its number.
        batch_size: when shuffling, of all processes and pieces together; else of each batch.
        shuffle: for training.
        workers: processes that load; 0: none but this one.
        pin_memory: for copies to a GPU.
        share: of this process: when shuffling its pieces of each batch, else every so manieth sample.
    """
    samples.epoch = epoch
    generator = torch.Generator().manual_seed(seed_from(samples.seed, epoch))
    pieces: Sampler[list[int]]
    if shuffle:
        pieces = TrainingPieces(len(samples), min(batch_size, len(samples)), share, generator)
    else:
        pieces = BatchSampler(range(share.rank, len(samples), share.world), batch_size, drop_last=False)
    return DataLoader(
        samples, batch_sampler=pieces, num_workers=workers, pin_memory=pin_memory, generator=torch.Generator()
    )


class ImageFiles(Dataset[tuple[Any, int]]):
    """Image files and their labels: ``files[index]`` -> transformed image, label.

    A class is the folder right below, whatever is nested in it; what is hidden is left out. timm's own dataset takes
    every nested folder for a class, leaves files open, and replaces a broken image by its neighbour.

    Args:
        folder: one sub-folder per class.
        mode: Pillow's, ``'RGB'`` or ``'L'``.
        class_to_idx: numbers of the classes; default: in order of their names.
    """

    def __init__(self, folder: Path, mode: str, class_to_idx: dict[str, int] | None = None) -> None:
        if class_to_idx is None:
            names = (path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.'))
            class_to_idx = {name: n for n, name in enumerate(sorted(names, key=natural_key))}

        def is_shown_image(path: str) -> bool:
            parts = Path(path).relative_to(folder).parts
            return has_file_allowed_extension(path, IMG_EXTENSIONS) and not any(p.startswith('.') for p in parts)

        self.class_to_idx = class_to_idx
        self.samples: list[tuple[str, int]] = []
        if class_to_idx:
            self.samples = make_dataset(folder, class_to_idx, is_valid_file=is_shown_image, allow_empty=True)
        self.mode = mode
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        with Image.open(path) as opened:
            image: Image.Image = opened
            if image.mode.startswith('I'):  # of 16 bits, which Pillow would clip to 8
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return self.transform(image.convert(self.mode)), label


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
    test = _read_split(test_folder, mode, train.class_to_idx)
    _check_images([path for path, _ in train.samples + test.samples], workers)
    config = {key: data_config[key] for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')}
    train.transform = create_transform(**config, is_training=True, **(augmentation or {}))
    test.transform = create_transform(**config)
    return Splits(SeededSamples(train, seed), SeededSamples(test, seed), tuple(train.class_to_idx))


def _find_split(folder: Path, names: Sequence[str]) -> Path:
    """Find the sub-folder that goes by one of these names."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    found = sorted(path.name + '/' * path.is_dir() for path in folder.iterdir())
    held = ', '.join(found[:5]) + ', ...' * (len(found) > 5) if found else 'nothing'
    raise FileNotFoundError(f'expected a folder named {" or ".join(names)} in {str(folder)!r}, got {held}')


def _read_split(folder: Path, mode: str, class_to_idx: dict[str, int] | None = None) -> ImageFiles:
    """List the images of one split; ``class_to_idx`` are the classes of the training images, if these are others."""
    files = ImageFiles(folder, mode, class_to_idx)
    classes = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.')}
    if unknown := sorted(classes - set(files.class_to_idx)):
        raise ValueError(f'expected only classes of the training images in {str(folder)!r}, got {", ".join(unknown)}')
    if not files.samples:
        raise ValueError(f'expected folders of images, one for each class, in {str(folder)!r}, got no images')
    if class_to_idx is not None:
        return files
    held = {label for _, label in files.samples}
    empty = [name for name, label in files.class_to_idx.items() if label not in held]
    if len(held) < 2:
        name = next(name for name, label in files.class_to_idx.items() if label in held)
        raise ValueError(f'expected images of at least 2 classes in {str(folder)!r}, got those of {name!r} only')
    if empty:
        raise ValueError(f'expected images in every folder in {str(folder)!r}, got none in {", ".join(empty)}')
    return files


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
        others = f' (and {len(broken) - 1} more)' if len(broken) > 1 else ''
        raise ValueError(f'expected readable images, got a broken one: {path}: {text}{others}')

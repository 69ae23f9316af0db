"""Folders of images to fine-tune on, checked before any long work."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, make_dataset

TRAIN_FOLDERS = ('train', 'training')
TEST_FOLDERS = ('val', 'validation', 'valid', 'test', 'eval')
# Up to this many images are decoded before training starts; of more, only the headers are read.
MAX_DECODED = 20_000


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
            return self.transform(in_mode(opened, self.mode)), label


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to a mode of 8 bits."""
    if image.mode.startswith('I'):  # of 16 bits, which Pillow would clip to 8
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert(mode)


def find_folders(
    folder: Path, mode: str, class_to_idx: dict[str, int] | None = None, workers: int = 4
) -> tuple[ImageFiles, ImageFiles]:
    """Find the training and the test images in a folder with one sub-folder per split and in each one per class.

    Args:
        folder: has ``train/`` and one of ``val/``, ``validation/``, ``test/``.
        mode: Pillow's, of the images.
        class_to_idx: numbers of the classes; default: in order of their names.
        workers: threads that check the images.

    Raises:
        FileNotFoundError: the folder, or one of its splits, does not exist.
        ValueError: it holds no images, a single class, classes that differ between the splits, or a broken image.
    """
    _check_is_folder(folder)
    train_folder, test_folder = (_find_split(folder, names) for names in (TRAIN_FOLDERS, TEST_FOLDERS))
    train = _read_split(train_folder, mode, class_to_idx)
    _check_classes(train, train_folder, all_of_them=class_to_idx is None)
    test = _read_split(test_folder, mode, train.class_to_idx)
    _check_images([path for path, _ in train.samples + test.samples], workers)
    return train, test


def find_test_folder(
    folder: Path, mode: str, class_to_idx: dict[str, int] | None = None, workers: int = 4
) -> ImageFiles:
    """Find the test images in a folder: in its ``val/`` if it has one, or else right in its folders of classes.

    Args:
        folder: one that `find_folders` reads, or one of its splits.
        mode: Pillow's, of the images.
        class_to_idx: numbers of the classes; default: in order of the names of the training images' classes or,
            where there are none, of their own.
        workers: threads that check the images.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it holds no images, unknown classes, or a broken image.
    """
    _check_is_folder(folder)
    train_folder, test_folder = (
        next((folder / name for name in names if (folder / name).is_dir()), None)
        for names in (TRAIN_FOLDERS, TEST_FOLDERS)
    )
    if class_to_idx is None and train_folder is not None and test_folder is not None:
        class_to_idx = ImageFiles(train_folder, mode).class_to_idx
    test = _read_split(test_folder or folder, mode, class_to_idx)
    _check_images([path for path, _ in test.samples], workers)
    return test


def _check_is_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f'expected a folder of images, got {str(folder)!r}, which is not a folder')


def shown(names: Iterable[str]) -> str:
    """The first few of several names."""
    few = list(names)
    return ', '.join(few[:5]) + ', ...' * (len(few) > 5)


def _find_split(folder: Path, names: Sequence[str]) -> Path:
    """Find the sub-folder that goes by one of these names."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    found = sorted(path.name + '/' * path.is_dir() for path in folder.iterdir())
    held = shown(found) if found else 'nothing'
    raise FileNotFoundError(f'expected a folder named {" or ".join(names)} in {str(folder)!r}, got {held}')


def _read_split(folder: Path, mode: str, class_to_idx: dict[str, int] | None) -> ImageFiles:
    """List the images of one split; ``class_to_idx`` are the classes that it may have, None: those that it has."""
    files = ImageFiles(folder, mode, class_to_idx)
    classes = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.')}
    if unknown := sorted(classes - set(files.class_to_idx)):
        raise ValueError(f'expected classes among {shown(files.class_to_idx)} in {str(folder)!r}, got {shown(unknown)}')
    if not files.samples:
        raise ValueError(f'expected folders of images, one for each class, in {str(folder)!r}, got no images')
    return files


def _check_classes(files: ImageFiles, folder: Path, all_of_them: bool) -> None:
    """Raise ValueError unless training images are of 2 classes or more, or of all the classes."""
    held = {label for _, label in files.samples}
    empty = [name for name, label in files.class_to_idx.items() if label not in held]
    if len(held) < 2:
        name = next(name for name, label in files.class_to_idx.items() if label in held)
        raise ValueError(f'expected images of at least 2 classes in {str(folder)!r}, got those of {name!r} only')
    if empty and all_of_them:
        raise ValueError(f'expected images in every folder in {str(folder)!r}, got none in {", ".join(empty)}')


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

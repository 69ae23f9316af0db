"""Folders of images, as people have them: split / class / anything / image."""

import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from timm_apvit.pictures.images import eight_bit, opened, unreadable

TRAIN_FOLDERS = ('train', 'training')
TEST_FOLDERS = ('val', 'validation', 'test', 'testing')

_logger = logging.getLogger(__name__)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """A total order in which ``9`` comes before ``10``, whatever the disk's own."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r'(\d+)', name)], name


class ImageFiles:
    """The images of a folder: ``files[index]`` -> transformed image, label. A class is the folder right below.

    What Pillow reads is an image. Hidden files and folders are left out, and a folder that links lead to again; how
    many others are left out is logged.

    Args:
        folder: with a folder for each class.
        in_chans: channels, 1 or 3.
        class_to_idx: numbers of the classes; default: in order of their names, in which ``9`` comes before ``10``.
    """

    def __init__(self, folder: Path, in_chans: int, class_to_idx: dict[str, int] | None = None) -> None:
        self.folder, self.in_chans = folder, in_chans
        self.transform: Any = None
        names = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.')]
        self.held = set(names)
        if class_to_idx is None:
            class_to_idx = {name: number for number, name in enumerate(sorted(names, key=natural_key))}
        self.class_to_idx = class_to_idx
        self.samples: list[tuple[str, int]] = []
        readable = endings()
        left_out: Counter[str] = Counter()
        root = os.path.realpath(folder)
        seen = {root}
        for through_links in (False, True):  # what lies in a class is of that class, wherever links to it are
            for name in sorted(self.held & class_to_idx.keys(), key=natural_key):
                for path in _files(folder / name, root, seen, through_links):
                    ending = path.suffix.lower()
                    if ending in readable:
                        self.samples.append((str(path), class_to_idx[name]))
                    else:
                        left_out[ending or 'no ending'] += 1
        self.samples.sort(key=lambda sample: natural_key(sample[0]))
        if left_out:
            counts = ', '.join(f'{number} of {ending}' for ending, number in left_out.most_common())
            _logger.warning('%s: files that Pillow does not read are left out: %s.', folder, counts)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        with opened(Path(path)) as image:
            image = eight_bit(image, self.in_chans)
        return self.transform(image), label

    @property
    def labels(self) -> list[int]:
        """Of all samples."""
        return [label for _, label in self.samples]


def endings() -> set[str]:
    """Endings of the files that Pillow reads, such as ``.jpg``."""
    Image.init()
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def images_below(path: Path) -> list[Path]:
    """The images in a folder and in those below, in order; of a file the file itself."""
    if not path.is_dir():
        return [path]
    readable, root, seen = endings(), os.path.realpath(path), set[str]()
    found = [each for links in (False, True) for each in _files(path, root, seen, links)]
    return [each for each in found if each.suffix.lower() in readable]


def _files(folder: Path, root: str, seen: set[str], through_links: bool) -> Iterable[Path]:
    """Files in and below a folder but for hidden ones, each folder once.

    Args:
        folder: to walk.
        root: real path of where the whole walk begins; links to what lies above it are not followed.
        seen: real paths of folders that are not to be read again; those that are read are added.
        through_links: whether links to folders are followed.
    """
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        linked = where != str(folder) and Path(where).is_symlink()
        if linked and (not through_links or real in seen or Path(root).is_relative_to(real)):
            folders.clear()
            continue
        folders[:] = sorted((name for name in folders if not name.startswith('.')), key=natural_key)
        if real not in seen:
            seen.add(real)
            for name in sorted((name for name in files if not name.startswith('.')), key=natural_key):
                yield Path(where, name)


def find_folders(
    folder: Path, in_chans: int, class_to_idx: dict[str, int] | None = None, workers: int = 4
) -> tuple[ImageFiles, ImageFiles]:
    """Find the training and the test images in a folder with one sub-folder per split and in each one per class.

    Args:
        folder: has ``train/`` and one of ``val/``, ``validation/``, ``test/``.
        in_chans: channels of the images, 1 or 3.
        class_to_idx: numbers of the classes; default: in order of their names.
        workers: threads that look at the images.

    Raises:
        FileNotFoundError: the folder, or one of its splits, does not exist.
        ValueError: it holds no images, a single class, classes that differ between the splits, or what is no image.
    """
    _check_is_folder(folder)
    train_folder, test_folder = (_find_split(folder, names) for names in (TRAIN_FOLDERS, TEST_FOLDERS))
    train = _read_split(train_folder, in_chans, class_to_idx)
    _check_classes(train, all_of_them=class_to_idx is None)
    test = _read_split(test_folder, in_chans, train.class_to_idx)
    if lacking := sorted(set(train.class_to_idx) - test.held, key=natural_key):
        _logger.warning('%s has no images of %s, which are not tested.', test_folder, shown(lacking))
    _check_images([path for path, _ in train.samples + test.samples], workers)
    return train, test


def find_test_folder(
    folder: Path, in_chans: int, class_to_idx: dict[str, int] | None = None, workers: int = 4
) -> ImageFiles:
    """Find the test images in a folder: in its ``val/`` if it has one, or else right in its folders of classes.

    Args:
        folder: one that `find_folders` reads, or one of its splits.
        in_chans: channels of the images, 1 or 3.
        class_to_idx: numbers of the classes; default: in order of the names of the training images' classes or,
            where there are none, of their own.
        workers: threads that look at the images.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it holds no images, unknown classes, or what is no image.
    """
    _check_is_folder(folder)
    train_folder, test_folder = (
        next((folder / name for name in names if (folder / name).is_dir()), None)
        for names in (TRAIN_FOLDERS, TEST_FOLDERS)
    )
    if class_to_idx is None and train_folder is not None and test_folder is not None:
        class_to_idx = ImageFiles(train_folder, in_chans).class_to_idx
    test = _read_split(test_folder or folder, in_chans, class_to_idx)
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


def _read_split(folder: Path, in_chans: int, class_to_idx: dict[str, int] | None) -> ImageFiles:
    """List the images of one split; ``class_to_idx`` are the classes that it may have, None: those that it has."""
    files = ImageFiles(folder, in_chans, class_to_idx)
    if unknown := sorted(files.held - files.class_to_idx.keys(), key=natural_key):
        raise ValueError(f'expected classes among {shown(files.class_to_idx)} in {str(folder)!r}, got {shown(unknown)}')
    if not files.samples:
        raise ValueError(f'expected folders of images, one for each class, in {str(folder)!r}, got no images')
    return files


def _check_classes(files: ImageFiles, all_of_them: bool) -> None:
    """Raise ValueError unless training images are of 2 classes or more, or of all the classes."""
    held, where = set(files.labels), repr(str(files.folder))
    empty = [name for name, label in files.class_to_idx.items() if label not in held]
    if len(held) < 2:
        name = next(name for name, label in files.class_to_idx.items() if label in held)
        raise ValueError(f'expected images of at least 2 classes in {where}, got those of {name!r} only')
    if empty and all_of_them:
        raise ValueError(f'expected images in every folder in {where}, got none in {", ".join(empty)}')


def _check_images(paths: Sequence[str], workers: int) -> None:
    """Raise ValueError that names files that do not begin like an image; what is cut off shows when it is read."""

    def problem(path: str) -> str:
        try:
            with Image.open(path):
                return ''
        except Exception as error:  # whatever the decoder of its format raises
            return unreadable(path, error)

    with warnings.catch_warnings(), ThreadPoolExecutor(max(1, workers)) as pool:
        warnings.simplefilter('ignore')
        problems = [text for text in pool.map(problem, paths) if text]
    if problems:
        raise ValueError(problems[0] + f' (and {len(problems) - 1} more)' * (len(problems) > 1))

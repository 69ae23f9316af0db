"""Image files, as people have them: split / class / anything / image, or listed with their labels in a CSV."""

import csv
import io
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import MultiLabelTarget

from timm_apvit.failures import listed
from timm_apvit.pictures.images import eight_bit, opened, unreadable

TRAIN_NAMES = ('train', 'training')
TEST_NAMES = ('val', 'validation', 'test', 'testing')
SEPARATOR = '|'  # of the labels of an image, in a CSV

_logger = logging.getLogger(__name__)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """A total order in which ``9`` comes before ``10``, whatever the disk's own."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r'(\d+)', name)], name


def numbered(names: Iterable[str]) -> dict[str, int]:
    """Classes and their numbers, in order of their names."""
    return {name: number for number, name in enumerate(sorted(names, key=natural_key))}


class ImageFiles:
    """Image files: ``files[index]`` -> transformed image, label.

    Args:
        source: what they were found in, for people.
        samples: path of each, and its number or, of a CSV of several labels, numbers.
        class_to_idx: numbers of the classes.
        held: classes that the source has.
        multi_label: whether labels are ``(classes,)`` of 0 and 1.
    """

    def __init__(
        self,
        source: Path,
        samples: Sequence[tuple[str, Any]],
        class_to_idx: dict[str, int],
        held: set[str],
        multi_label: bool = False,
    ) -> None:
        self.source, self.samples = source, samples
        self.class_to_idx, self.held, self.multi_label = class_to_idx, held, multi_label
        self.in_chans = 3  # as the model takes them
        self.transform: Any = None
        self._encode: Any = MultiLabelTarget(len(class_to_idx)) if multi_label else int

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, label = self.samples[index]
        with opened(Path(path)) as image:
            image = eight_bit(image, self.in_chans)
        return self.transform(image), self._encode(label)

    @property
    def labels(self) -> list[int] | None:
        """Of all samples; None: each has any number of them."""
        return None if self.multi_label else [label for _, label in self.samples]


def read_folder(folder: Path, class_to_idx: dict[str, int] | None = None) -> ImageFiles:
    """List the images of a folder with one folder right below for each class.

    What Pillow reads is an image. Hidden files and folders are left out, and a folder that links lead to again; how
    many others are left out is logged.

    Args:
        folder: to list.
        class_to_idx: numbers of the classes that it may have; default: in order of the names that it has.
    """
    held = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.')}
    class_to_idx = numbered(held) if class_to_idx is None else class_to_idx
    samples: list[tuple[str, int]] = []
    readable, left_out = endings(), Counter[str]()
    root = os.path.realpath(folder)
    seen = {root}
    for through_links in (False, True):  # what lies in a class is of that class, wherever links to it are
        for name in sorted(held & class_to_idx.keys(), key=natural_key):
            for path in _files(folder / name, root, seen, through_links):
                ending = path.suffix.lower()
                if ending in readable:
                    samples.append((str(path), class_to_idx[name]))
                else:
                    left_out[ending or 'no ending'] += 1
    if left_out:
        counts = ', '.join(f'{number} of {ending}' for ending, number in left_out.most_common())
        _logger.warning('%s: files that Pillow does not read are left out: %s.', folder, counts)
    return ImageFiles(folder, sorted(samples, key=lambda each: natural_key(each[0])), class_to_idx, held)


def read_csv(file: Path, class_to_idx: dict[str, int] | None = None, multi_label: bool = False) -> ImageFiles:
    """List the images of a CSV: path, from the file's folder, and label in its first two columns, below a header.

    Args:
        file: to read.
        class_to_idx: numbers of the classes that it may have; default: in order of the names that it has.
        multi_label: whether an image has any number of labels, with ``|`` between them.
    """
    try:
        reader = csv.reader(io.StringIO(file.read_text(encoding='utf-8-sig'), newline=''))
        header, *rows = [(reader.line_num, row) for row in reader if row] or [(1, [''])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f'expected a CSV in UTF-8, got another file in {file}: {error}') from None
    if header[1][0].strip() and (file.parent / header[1][0].strip()).is_file():
        raise ValueError(f'expected a header in line {header[0]} of {file}, such as image,label, got {header[1]}')
    entries: list[tuple[str, list[str]]] = []
    for number, row in rows:
        names = [name.strip() for name in (row[1].split(SEPARATOR) if multi_label else row[1:2])] if row[1:] else []
        names = [name for name in names if name]
        if not row[0].strip() or not (multi_label or names):
            hint = '' if multi_label else ' (--multi-label: of no label, or of several)'
            raise ValueError(f'expected the path of an image and its label in line {number} of {file}{hint}, got {row}')
        path = file.parent / row[0].strip()
        if not path.is_file():
            raise FileNotFoundError(f'expected images that exist in {file}, got {str(path)!r} in line {number}')
        entries.append((str(path), names))
    held = {name for _, names in entries for name in names}
    if not multi_label and any(SEPARATOR in name for name in held):
        _logger.warning('%s: labels with %s are classes of their own; --multi-label takes them apart.', file, SEPARATOR)
    class_to_idx = numbered(held) if class_to_idx is None else class_to_idx
    known = [(path, [class_to_idx[name] for name in names if name in class_to_idx]) for path, names in entries]
    samples = known if multi_label else [(path, labels[0]) for path, labels in known if labels]
    return ImageFiles(file, samples, class_to_idx, held, multi_label)


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


def _files(folder: Path, root: str, seen: set[str], through_links: bool) -> Iterator[Path]:
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


def find_splits(
    folder: Path, class_to_idx: dict[str, int] | None = None, workers: int = 4, multi_label: bool = False
) -> tuple[ImageFiles, ImageFiles]:
    """Find the training and the test images of a folder.

    Args:
        folder: has ``train/`` and one of ``val/``, ``validation/``, ``test/`` with a folder for each class; or CSV
            files of such names.
        class_to_idx: numbers of the classes; default: in order of their names.
        workers: threads that look at the images.
        multi_label: whether an image of a CSV has any number of labels.
    """
    check_is_folder(folder)
    train_source, test_source = (_split(folder, names) for names in (TRAIN_NAMES, TEST_NAMES))
    train = _read(train_source, class_to_idx, multi_label)
    _check_classes(train, all_of_them=class_to_idx is None)
    test = _read(test_source, train.class_to_idx, multi_label)
    if lacking := sorted(set(train.class_to_idx) - test.held, key=natural_key):
        _logger.warning('%s has no images of %s, which are not tested.', test_source, listed(lacking))
    _check_images([path for path, _ in [*train.samples, *test.samples]], workers)
    return train, test


def find_test(
    folder: Path, class_to_idx: dict[str, int] | None = None, workers: int = 4, multi_label: bool = False
) -> ImageFiles:
    """Find the test images of a folder: those of `find_splits`, or else those right in its folders of classes.

    Where ``class_to_idx`` is None classes are numbered as the training images' or, where there are none, as their own.
    """
    check_is_folder(folder)
    train_source, test_source = (_found(folder, names) for names in (TRAIN_NAMES, TEST_NAMES))
    if class_to_idx is None and train_source is not None and test_source is not None:
        class_to_idx = _read(train_source, None, multi_label).class_to_idx
    test = _read(test_source or folder, class_to_idx, multi_label)
    _check_images([path for path, _ in test.samples], workers)
    return test


def check_is_folder(folder: Path) -> None:
    """Raise FileNotFoundError unless it is one."""
    if not folder.is_dir():
        raise FileNotFoundError(f'expected a folder of images, got {str(folder)!r}, which is not a folder')


def _found(folder: Path, names: Sequence[str]) -> Path | None:
    """The CSV or, where there is none, the sub-folder that goes by one of these names."""
    candidates = [folder / f'{name}{ending}' for ending in ('.csv', '') for name in names]
    return next((path for path in candidates if (path.is_file() if path.suffix else path.is_dir())), None)


def _split(folder: Path, names: Sequence[str]) -> Path:
    if (found := _found(folder, names)) is not None:
        return found
    held = sorted(path.name + '/' * path.is_dir() for path in folder.iterdir())
    expected = f'a folder named {" or ".join(names)}, or a CSV of such a name'
    raise FileNotFoundError(f'expected {expected}, in {str(folder)!r}, got {listed(held) if held else "nothing"}')


def _read(source: Path, class_to_idx: dict[str, int] | None, multi_label: bool) -> ImageFiles:
    """List the images of one split; ``class_to_idx`` are the classes that it may have, None: those that it has."""
    if source.is_dir() and multi_label:
        raise ValueError(f'expected CSV files with --multi-label, in which an image has its labels, got {source}/')
    files = read_folder(source, class_to_idx) if source.is_dir() else read_csv(source, class_to_idx, multi_label)
    if unknown := sorted(files.held - files.class_to_idx.keys(), key=natural_key):
        raise ValueError(
            f'expected classes among {listed(files.class_to_idx)} in {str(source)!r}, got {listed(unknown)}'
        )
    if not files.samples:
        raise ValueError(f'expected images with their classes in {str(source)!r}, got no images')
    return files


def _check_classes(files: ImageFiles, all_of_them: bool) -> None:
    """Raise ValueError unless training images are of 2 classes or more, or of all the classes."""
    labels = files.labels
    held = set(files.class_to_idx.values()) if labels is None else set(labels)
    empty = [name for name, label in files.class_to_idx.items() if label not in held]
    if len(held) < 2:
        name = next((name for name, label in files.class_to_idx.items() if label in held), 'none')
        raise ValueError(f'expected images of at least 2 classes in {str(files.source)!r}, got those of {name!r} only')
    if empty and all_of_them:
        raise ValueError(f'expected images in every folder in {str(files.source)!r}, got none in {", ".join(empty)}')


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

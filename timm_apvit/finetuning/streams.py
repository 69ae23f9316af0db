"""The datasets that timm reads by a name: torchvision's, those of the Hugging Face Hub, WebDataset's shards."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from timm_apvit.failures import one_line
from timm_apvit.finetuning.samples import Sample, SeededSamples, checked_label, seed_from, seeded
from timm_apvit.finetuning.settings import Settings
from timm_apvit.pictures.images import eight_bit

# What begins the name of a timm dataset -> the package that reads it, and how to install that.
READERS: dict[str, tuple[str, str]] = {
    'hfds': ('datasets', "'timm-apvit[datasets]'"),
    'hfids': ('datasets', "'timm-apvit[datasets]'"),
    'wds': ('webdataset', "'timm-apvit[webdataset]'"),
    'tfds': ('tensorflow_datasets', 'tensorflow tensorflow-datasets'),
    'torch': ('torchvision', 'torchvision'),
}
STREAMS = ('hfids', 'wds', 'tfds')


def reader_of(data: str) -> str | None:
    """What reads the timm dataset of this name, ``'wds'`` for instance; None: it is a folder."""
    prefix, slash, _ = data.partition('/')
    return prefix.lower() if slash and prefix.lower() in READERS else None


class Stream:
    """Samples that can only be read in order, from shards that are shared out to processes and their workers.

    In training it has no end: whoever has read its shards begins again. In a test every sample comes once. What an
    epoch has is a function of seed, epoch and the numbers of processes and workers.

    Args:
        dataset: timm's `IterableImageDataset` of untransformed images, made after ``torch.distributed`` is set up.
        length: the number of samples, as the data or the user declare it; 0: unknown, for a test only.
        seed: of shuffling and transforms, with the epoch.
        transform: image -> ``(C, H, W)``.
        num_classes: that labels must be below.
    """

    def __init__(self, dataset: Any, length: int, seed: int, transform: Any, num_classes: int) -> None:
        self.dataset, self.length, self.seed, self.transform = dataset, length, seed, transform
        self.num_classes = num_classes
        self.epoch = 0
        together = dist.is_initialized()
        self.rank, processes = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.is_training: bool = dataset.reader.is_training
        shards = _number_of_shards(dataset.reader)
        if shards is not None and shards < processes:
            raise ValueError(f'expected a shard for each of {processes} processes, got {shards}: use fewer')
        self.most_workers = None if shards is None else shards // processes
        info: Any = getattr(dataset.reader, 'split_info', None)
        if not self.is_training and hasattr(info, 'filenames'):
            # Shards of its own for each: timm would repeat and leave out samples to make processes alike.
            own = tuple(info.filenames)[self.rank :: processes]
            dataset.reader.split_info = dataclasses.replace(info, filenames=own)
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1

    def __len__(self) -> int:
        return self.length

    def loader(self, batch_size: int, workers: int, pin_memory: bool = False) -> DataLoader[Sample]:
        """Load batches, by at most as many workers as there are shards."""
        workers = workers if self.most_workers is None else min(workers, self.most_workers)
        # timm makes its pipeline once; one that read an epoch before would continue with that epoch's random state.
        self.dataset.reader.ds = None
        self.dataset.reader.batch_size = batch_size
        self.dataset.set_loader_cfg(num_workers=max(1, workers))
        return DataLoader(
            _Reading(self),
            batch_size=batch_size,
            num_workers=workers,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(seed_from(self.seed, self.epoch)),
        )


class _Reading(IterableDataset[Sample]):
    """What one process, or one of its workers, reads of a stream; unlike the stream it tells loaders no length."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Sample]:
        stream, info = self.stream, get_worker_info()
        worker = 0 if info is None else info.id
        stream.dataset.set_epoch(stream.epoch)
        position, again = 0, True
        while again:
            begun = position
            for image, label in stream.dataset:
                with seeded(seed_from(stream.seed, stream.epoch, stream.rank, worker, position)):
                    transformed = stream.transform(image)
                position += 1
                yield transformed, checked_label(label, stream.num_classes)
            again = stream.is_training
            if again and position == begun:
                raise RuntimeError('expected images for training in the shards of a worker, got none')


def class_map(settings: Settings) -> dict[str, int] | None:
    """Numbers of the classes that --class-map names."""
    if settings.class_map is None:
        return None
    path = Path(settings.class_map)
    if not path.is_file():
        raise FileNotFoundError(f'expected a file of names of classes, got {str(path)!r}, which is not a file')
    try:
        lines = path.read_text(encoding='utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f'expected names of classes in UTF-8, got another encoding in {path}: {error}') from None
    names = [line.strip() for line in lines if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f'expected 2 or more names of classes in {path}, a line each and all different, got {names}')
    return {name: number for number, name in enumerate(names)}


def create_timm_dataset(settings: Settings, is_training: bool) -> Any:
    """Make timm's dataset of one split, shuffled if it is a stream for training, without transforms.

    Raises:
        ValueError, OSError: it cannot be read.
    """
    name = str(settings.data)
    reader, split = reader_of(name), settings.train_split if is_training else settings.val_split
    arguments: dict[str, Any] = {}
    if reader in STREAMS:
        number = settings.train_samples if is_training else settings.val_samples
        # timm seeds generators of 32 bits.
        arguments = {'is_training': is_training, 'seed': settings.seed % 2**31, 'num_samples': number}
        arguments |= {} if reader == 'wds' else {'download': settings.download}
    if reader == 'torch':
        if settings.data_dir is None:
            raise ValueError(f'expected --data-dir, the folder that holds the files of {name}, got none')
        arguments.update(root=settings.data_dir, download=settings.download)
    else:
        # timm joins the folder and the names of wds/ shards, which may be addresses.
        root = settings.data_dir or ('' if reader == 'wds' else None)
        arguments.update(root=root, input_key=settings.image_key, target_key=settings.target_key, input_img_mode='')
    try:
        with _without_warnings():
            dataset = create_dataset(name, split=split, **arguments)
        if reader == 'wds':
            _check_shards_exist(dataset.reader)
    except FileNotFoundError:
        raise
    # Whatever reads them fails in its own ways: HTTP errors, assertions, KeyError, ...
    except Exception as error:
        length = '--train-samples' if is_training else '--val-samples'
        hint = f'; give {length} where the data do not say how many images they have' * (reader in STREAMS)
        raise ValueError(f'cannot read split {split!r} of {name}: {one_line(error)}{hint}') from error
    return dataset


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep timm from warning of a file that shards may have, and need not if their pattern is given."""
    logger = logging.getLogger('timm.data.readers.reader_wds')
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _check_shards_exist(reader: Any) -> None:
    """Raise FileNotFoundError for a local shard that is not there, which would be left out with a warning only."""
    for name in reader.split_info.filenames:
        path = Path(reader.root, name)
        if not any(sign in name or sign in reader.root for sign in ('://', 'pipe:', '::')) and not path.is_file():
            raise FileNotFoundError(f'expected shards that exist, got {str(path)!r}: give --data-dir or a pattern')


def label_names_of(dataset: Any, settings: Settings) -> tuple[str, ...]:
    """Names of the classes: those of the map, or the dataset's own, or numbers.

    Raises:
        ValueError: nobody says how many classes there are, or not the same number.
    """
    names = tuple(class_map(settings) or ()) or _own_names(dataset)
    if settings.num_classes is not None and names and len(names) != settings.num_classes:
        raise ValueError(f'expected --num-classes {len(names)}, as the data have, or none, got {settings.num_classes}')
    names = names or tuple(map(str, range(settings.num_classes or 0)))
    if len(names) < 2:
        raise ValueError(
            f'expected data of 2 classes or more, got {settings.data}, which names {len(names)}: '
            'give --num-classes or --class-map'
        )
    return names


def _own_names(dataset: Any) -> tuple[str, ...]:
    """Names that a dataset has for its classes, in order of their numbers; none: it does not say."""
    numbers = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    if numbers:
        return tuple(map(str, sorted(numbers, key=numbers.__getitem__)))
    own: Any = getattr(dataset, 'classes', None) or getattr(dataset, 'all_categories', ())
    # torchvision's ImageNet has several names for a class, the first of which two classes may share.
    return tuple(each if isinstance(each, str) else ', '.join(map(str, each)) for each in own)


class _Transform:
    """Convert an image to what a model takes, then transform it: an object that worker processes can be sent."""

    def __init__(self, in_chans: int, transform: Any) -> None:
        self.in_chans, self.transform = in_chans, transform

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(eight_bit(image, self.in_chans))


def samples_of(
    dataset: Any, transform: Any, settings: Settings, in_chans: int, names: tuple[str, ...]
) -> SeededSamples | Stream:
    """Samples of a timm dataset, transformed and with checked labels."""
    converted = _Transform(in_chans, transform)
    own_names = _own_names(dataset)
    if own_names and own_names != names:
        if unknown := sorted(set(own_names) - set(names)):
            raise ValueError(f'expected a --class-map of all classes of {settings.data}, got none of {unknown[0]!r}')
        dataset.target_transform = [names.index(name) for name in own_names].__getitem__
    if reader_of(str(settings.data)) in STREAMS:
        return Stream(dataset, dataset.reader.num_samples or 0, settings.seed, converted, len(names))
    if not len(dataset):
        raise ValueError(f'expected images, got none in {settings.data}')
    dataset.transform = converted
    return SeededSamples(dataset, settings.seed, len(names))


def _number_of_shards(reader: Any) -> int | None:
    """How many shards workers can share; None: as many as they want, or unknown."""
    if (info := getattr(reader, 'split_info', None)) is not None and hasattr(info, 'filenames'):
        return len(info.filenames)
    if hasattr(reader, 'builder') and hasattr(reader, 'split') and not getattr(reader, 'download', False):
        shards: int | None = getattr(reader.builder.as_streaming_dataset(split=reader.split), 'num_shards', None)
        return shards
    return None

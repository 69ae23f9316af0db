"""The datasets that timm reads by a name: torchvision's, those of the Hugging Face Hub, WebDataset's shards."""

import dataclasses
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from timm_apvit.failures import one_line
from timm_apvit.finetuning.samples import WHOLE, Batches, BatchSplit, Sample, Samples, checked_label, seed_from, seeded
from timm_apvit.finetuning.settings import Settings

# What begins the name of a timm dataset -> the package that reads it, and how to install that.
READERS: dict[str, tuple[str, str]] = {
    'hfds': ('datasets', "'timm-apvit[datasets]'"),
    'hfids': ('datasets', "'timm-apvit[datasets]'"),
    'wds': ('webdataset', "'timm-apvit[webdataset]'"),
    'tfds': ('tensorflow_datasets', 'tensorflow tensorflow-datasets'),
    'torch': ('torchvision', 'torchvision'),
}
STREAMS = ('hfids', 'wds', 'tfds')

# It warns of a file that shards may have, and need not if their pattern is given.
logging.getLogger('timm.data.readers.reader_wds').setLevel(logging.ERROR)


def reader_of(data: str) -> str | None:
    """What reads the timm dataset of this name, ``'wds'`` for instance; None: it is a folder."""
    prefix, slash, _ = data.partition('/')
    return prefix.lower() if slash and prefix.lower() in READERS else None


class Stream(Samples):
    """Samples that can only be read in order, from shards that processes and their workers share.

    In training it has no end: whoever has read its shards begins again. In a test every sample comes once. What an
    epoch has is a function of seed, epoch and the numbers of processes and workers. Batches are loaded as by `Samples`.

    Args:
        dataset: timm's `IterableImageDataset` of untransformed images, made after ``torch.distributed`` is set up.
        seed: of shuffling and transforms, with the epoch.
        transform: image -> ``(C, H, W)``.
        num_classes: that labels must be below.
    """

    def __init__(self, dataset: Any, seed: int, transform: Any, num_classes: int) -> None:
        super().__init__(dataset.reader.num_samples or 0, seed)
        self.dataset, self.transform, self.num_classes = dataset, transform, num_classes
        self.is_training: bool = dataset.reader.is_training
        self.rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
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

    def training_batches(
        self,
        epoch: int,
        batch_size: int,
        split: BatchSplit = WHOLE,
        done: int = 0,
        weights: Tensor | None = None,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> Batches:
        """See `Samples`; what was done is read again, as a stream cannot be entered in its middle."""
        self.epoch = epoch
        loaded = self._read(max(1, batch_size // split.parts), workers, pin_memory)
        return islice(loaded, done * split.accumulated, None)

    def test_batches(self, batch_size: int, workers: int = 0, split: BatchSplit = WHOLE) -> Batches:
        """See `Samples`."""
        self.epoch = 0
        return self._read(batch_size, workers)

    def some(self, number: int) -> tuple[Tensor, Tensor]:
        """See `Samples`; the first ones."""
        return next(self.test_batches(number))

    def _read(self, batch_size: int, workers: int, pin_memory: bool = False) -> Batches:
        workers = workers if self.most_workers is None else min(workers, self.most_workers)
        # timm makes its pipeline once; one that read an epoch before would continue with that epoch's random state.
        self.dataset.reader.ds = None
        self.dataset.reader.batch_size = batch_size
        self.dataset.set_loader_cfg(num_workers=max(1, workers))
        own = torch.Generator().manual_seed(seed_from(self.seed, self.epoch))
        loader = DataLoader(_Reading(self), batch_size, num_workers=workers, pin_memory=pin_memory, generator=own)
        return iter(loader)

    def read(self) -> Iterator[Sample]:
        """What one process, or one of its workers, reads of it."""
        info = get_worker_info()
        worker = 0 if info is None else info.id
        self.dataset.set_epoch(self.epoch)
        position, again = 0, True
        while again:
            begun = position
            for image, label in self.dataset:
                with seeded(seed_from(self.seed, self.epoch, self.rank, worker, position)):
                    transformed = self.transform(image)
                position += 1
                yield transformed, checked_label(label, self.num_classes)
            again = self.is_training
            if again and position == begun:
                raise RuntimeError('expected images for training in the shards of a worker, got none')


class _Reading(IterableDataset[Sample]):
    """A stream that tells loaders no length: with workers it is not that."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Sample]:
        return self.stream.read()


def create_timm_dataset(settings: Settings, is_training: bool) -> Any:
    """Make timm's dataset of one split, shuffled if it is a stream for training, without transforms."""
    name = str(settings.data)
    reader, split = reader_of(name), settings.train_split if is_training else settings.val_split
    arguments: dict[str, Any] = {}
    if reader in STREAMS:
        number = settings.train_samples if is_training else settings.val_samples
        # timm seeds generators of 32 bits.
        arguments = {'is_training': is_training, 'seed': settings.seed % 2**31, 'num_samples': number}
    if reader == 'torch':
        if settings.data_dir is None:
            raise ValueError(f'expected --data-dir, the folder that holds the files of {name}, got none')
        arguments.update(root=settings.data_dir, download=settings.download)
    else:
        # timm joins the folder and the names of wds/ shards, which may be addresses.
        root = settings.data_dir or ('' if reader == 'wds' else None)
        arguments.update(root=root, input_key=settings.image_key, target_key=settings.target_key, input_img_mode='')
        arguments |= {'download': settings.download} if reader in ('hfids', 'tfds') else {}
    try:
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


def _check_shards_exist(reader: Any) -> None:
    """Raise FileNotFoundError for a local shard that is not there, which would be left out with a warning only."""
    for name in reader.split_info.filenames:
        path = Path(reader.root, name)
        if not any(sign in name or sign in reader.root for sign in ('://', 'pipe:', '::')) and not path.is_file():
            raise FileNotFoundError(f'expected shards that exist, got {str(path)!r}: give --data-dir or a pattern')


def _number_of_shards(reader: Any) -> int | None:
    """How many shards workers can share; None: as many as they want, or unknown."""
    if (info := getattr(reader, 'split_info', None)) is not None and hasattr(info, 'filenames'):
        return len(info.filenames)
    if hasattr(reader, 'builder') and hasattr(reader, 'split') and not getattr(reader, 'download', False):
        shards: int | None = getattr(reader.builder.as_streaming_dataset(split=reader.split), 'num_shards', None)
        return shards
    return None


def own_label_names(dataset: Any) -> tuple[str, ...]:
    """Names that a dataset has for its classes, in order of their numbers; none: it does not say."""
    numbers = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    if numbers:
        return tuple(map(str, sorted(numbers, key=numbers.__getitem__)))
    own: Any = getattr(dataset, 'classes', None) or getattr(dataset, 'all_categories', ())
    # torchvision's ImageNet has several names for a class, the first of which two classes may share.
    return tuple(each if isinstance(each, str) else ', '.join(map(str, each)) for each in own)

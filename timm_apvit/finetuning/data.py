"""Samples and batches of them, whether their data can be indexed or only be read in order.

What a model sees in an epoch is a function of the seed and the epoch, so that an interruption does not change it. Where
data can be indexed every sample is a function of (seed, epoch, index) and of nothing else: the number of workers does
not matter either.
"""

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from timm_apvit.finetuning.distributed import own_share
from timm_apvit.finetuning.sharing import Share, TrainingPieces

Sample = tuple[Tensor, int]
# The share of a process that is alone.
WHOLE = Share()


class Splits(NamedTuple):
    """What a model is trained and tested on.

    Attributes:
        train: samples that differ from epoch to epoch.
        test: samples that never differ.
        label_names: the name of each class.
    """

    train: 'AnySamples'
    test: 'AnySamples'
    label_names: tuple[str, ...]


def seed_from(*entropy: int) -> int:
    """Mix integers >= 0 into one 63-bit seed."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of the CPU for what runs inside, and put them back to what they were.

    The random transforms of torchvision and timm draw from them, and their state depends on the worker and on what it
    loaded before.
    """
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


def _checked_label(label: Any, num_classes: int | None) -> int:
    """A label as an integer, which a loss on a GPU could only reject by ending the process.

    Raises:
        ValueError: it is not that of a class.
    """
    number = int(label)
    if num_classes is not None and not 0 <= number < num_classes:
        raise ValueError(f'expected labels from 0 to {num_classes - 1}, got {number}: see --num-classes')
    return number


class Samples(Dataset[Sample]):
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

    Args:
        dataset: ``dataset[index]`` -> image ``(C, H, W)``, label.
        seed: of the samples, with the epoch and the index.
        num_classes: that labels must be below; None: unchecked.
    """

    def __init__(self, dataset: Any, seed: int, num_classes: int | None = None) -> None:
        super().__init__(len(dataset), seed)
        self.dataset = dataset
        self.num_classes = num_classes

    def __getitem__(self, index: int) -> Sample:
        with seeded(seed_from(self.seed, self.epoch, index)):
            image, label = self.dataset[index]
        return image, _checked_label(label, self.num_classes)


class Stream:
    """Samples that can only be read in order, from shards that are shared out to processes and their workers.

    An epoch is a function of seed, epoch and the numbers of processes and workers: it is resumed at its beginning. In
    training it has as many batches as ``length`` samples fill, whatever those numbers are; in a test every sample is
    read once.

    Args:
        dataset: timm's `IterableImageDataset` of untransformed images, made after ``torch.distributed`` is set up.
        length: the number of samples, as the data or the user declare it; 0: unknown, for a test only.
        seed: of shuffling and transforms, with the epoch.
        transform: image -> ``(C, H, W)``.
        num_classes: that labels must be below.
        shards: the number of shards that workers can share; None: unknown.
    """

    def __init__(
        self, dataset: Any, length: int, seed: int, transform: Any, num_classes: int, shards: int | None = None
    ) -> None:
        self.dataset = dataset
        self.length = length
        self.seed = seed
        self.transform = transform
        self.num_classes = num_classes
        self.shards = shards
        self.epoch = 0
        share = own_share()
        self.rank, self.processes = share.rank, share.world
        if shards is not None and shards < self.processes:
            raise ValueError(f'expected a shard for each of {self.processes} processes, got {shards}: use fewer')
        self.is_training: bool = dataset.reader.is_training
        if not self.is_training and hasattr(dataset.reader, 'split_info') and shards is not None:
            self._share_test_shards()

    def __len__(self) -> int:
        return self.length

    def workers(self, wanted: int) -> int:
        """At most so many workers, that each has a shard."""
        return wanted if self.shards is None else min(wanted, self.shards // self.processes)

    def _share_test_shards(self) -> None:
        """Give this process shards of its own; timm would repeat and leave out samples to make processes alike."""
        reader = self.dataset.reader
        own = tuple(reader.split_info.filenames)[self.rank :: self.processes]
        reader.split_info = dataclasses.replace(reader.split_info, filenames=own)
        reader.dist_rank, reader.dist_num_replicas = 0, 1


AnySamples = Samples | Stream


class _Part(IterableDataset[Sample]):
    """What one process reads of an epoch of a stream.

    Args:
        stream: in the epoch to read.
        batch_size: of this process.
        batches: how many to read; None: all there is, once.
        workers: processes that load.
    """

    def __init__(self, stream: Stream, batch_size: int, batches: int | None, workers: int) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.batches = batches
        # timm makes its pipeline once; one that read an epoch before would continue with that epoch's random state.
        stream.dataset.reader.ds = None
        stream.dataset.reader.batch_size = batch_size
        stream.dataset.set_loader_cfg(num_workers=max(1, workers))

    def __len__(self) -> int:
        if self.batches is None:
            raise TypeError('expected a stream for training, whose epochs have a defined length, got one for a test')
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[Sample]:
        stream, info = self.stream, get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        expected = None
        if self.batches is not None:
            expected = (self.batches // workers + (worker < self.batches % workers)) * self.batch_size
        stream.dataset.set_epoch(stream.epoch)
        position = -1
        for position, (image, label) in enumerate(islice(stream.dataset, expected)):
            with seeded(seed_from(stream.seed, stream.epoch, stream.rank, worker, position)):
                transformed = stream.transform(image)
            yield transformed, _checked_label(label, stream.num_classes)
        if expected is not None and position + 1 < expected:
            raise RuntimeError(f'expected {expected} images from the shards of a worker, got {position + 1}')


def create_batches(
    samples: AnySamples,
    epoch: int,
    batch_size: int,
    shuffle: bool = False,
    workers: int = 0,
    pin_memory: bool = False,
    share: Share = WHOLE,
) -> DataLoader[Sample]:
    """Load one epoch of batches: ``(B, C, H, W)``, ``(B,)``, in an order of its own if shuffled.

    A last, smaller batch is dropped when shuffling, unless it is the only one.

    Args:
        samples: to load. A stream is shuffled if it was made for training, and gives what its process has to read.
        epoch: its number.
        batch_size: when shuffling, of all processes and pieces together; else of each batch.
        shuffle: for training.
        workers: processes that load; 0: none but this one.
        pin_memory: for copies to a GPU.
        share: of this process: when shuffling its pieces of each batch, else every so manieth sample.
    """
    samples.epoch = epoch
    generator = torch.Generator().manual_seed(seed_from(samples.seed, epoch))
    if isinstance(samples, Stream):
        workers = samples.workers(workers)
        piece = max(1, batch_size // share.parts) if shuffle else batch_size
        batches = max(1, samples.length // batch_size) * share.pieces if samples.is_training else None
        return DataLoader(
            _Part(samples, piece, batches, workers),
            batch_size=piece,
            num_workers=workers,
            pin_memory=pin_memory,
            generator=generator,
        )
    pieces: Sampler[list[int]]
    if shuffle:
        pieces = TrainingPieces(len(samples), min(batch_size, len(samples)), share, generator)
    else:
        pieces = BatchSampler(range(share.rank, len(samples), share.world), batch_size, drop_last=False)
    return DataLoader(
        samples, batch_sampler=pieces, num_workers=workers, pin_memory=pin_memory, generator=torch.Generator()
    )


def some_samples(samples: AnySamples, number: int) -> list[Sample]:
    """At most so many samples: spread over data that can be indexed, the first ones of a stream."""
    if isinstance(samples, Stream):
        images, labels = next(iter(create_batches(samples, 0, number)))
        return list(zip(images, labels.tolist(), strict=True))
    step = max(1, len(samples) // number)
    return [samples[index] for index in range(0, len(samples), step)][:number]

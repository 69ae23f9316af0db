"""Samples and batches of them: what a model sees in an epoch is a function of the seed and the epoch."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Sample = tuple[Tensor, Any]
Batches = Iterator[tuple[Tensor, Tensor]]


class BatchSplit(NamedTuple):
    """How the batch of an update is split among processes, and within each into micro-batches.

    Attributes:
        rank: of this process.
        world: number of processes.
        accumulated: micro-batches of each process.
    """

    rank: int = 0
    world: int = 1
    accumulated: int = 1

    @property
    def parts(self) -> int:
        """Micro-batches of all processes."""
        return self.world * self.accumulated


WHOLE = BatchSplit()


class Samples(Dataset[Sample]):
    """Images ``(C, H, W)`` and labels that are a function of (seed, epoch, index).

    Args:
        length: the number of samples of an epoch.
        seed: of the samples, with the epoch and the index.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    @property
    def known_labels(self) -> list[int] | None:
        """Labels of all samples; None: only reading them would tell."""
        return None

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
        """Load an epoch's micro-batches ``(B, C, H, W)`` and labels of this process, in an order of the epoch's own.

        Args:
            epoch: its number.
            batch_size: of an update, of all processes together.
            split: of each batch.
            done: updates that are left out at the beginning.
            weights: of the samples, by which they are drawn again and again; None: each comes once.
            workers: processes that load; 0: none but this one.
            pin_memory: for copies to a GPU.
        """
        self.epoch = epoch
        generator = torch.Generator().manual_seed(seed_from(self.seed, epoch))
        if weights is None:
            order = torch.randperm(len(self), generator=generator)
        else:
            order = torch.multinomial(weights, len(self), replacement=True, generator=generator)
        batches = micro_batches(order.tolist(), min(batch_size, len(self)), split)
        return self._loaded(batches[done * split.accumulated :], workers, pin_memory)

    def test_batches(self, batch_size: int, workers: int = 0, split: BatchSplit = WHOLE) -> Batches:
        """Load this process' samples once, in order."""
        self.epoch = 0
        own = range(split.rank, len(self), split.world)
        return self._loaded([own[n : n + batch_size] for n in range(0, len(own), batch_size)], workers)

    def _loaded(self, batches: Sequence[Any], workers: int, pin_memory: bool = False) -> Batches:
        own = torch.Generator()  # the loader would draw the seeds of its workers from the global generator
        return iter(DataLoader(self, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory, generator=own))

    def some(self, number: int) -> tuple[Tensor, Tensor]:
        """At most so many images ``(n, C, H, W)`` and their labels, spread over all."""
        count = min(number, len(self))
        samples = [self[n * len(self) // count] for n in range(count)]
        return torch.stack([image for image, _ in samples]), torch.stack([torch.as_tensor(y) for _, y in samples])


class SeededSamples(Samples):
    """The samples of another dataset, each transformed under a seed of its own, so that workers do not matter.

    Args:
        dataset: ``dataset[index]`` -> image ``(C, H, W)``, label.
        seed: of the samples, with the epoch and the index.
        num_classes: that labels must be below; None: unchecked.
    """

    def __init__(self, dataset: Any, seed: int, num_classes: int | None = None) -> None:
        super().__init__(len(dataset), seed)
        self.dataset, self.num_classes = dataset, num_classes

    def __getitem__(self, index: int) -> Sample:
        with seeded(seed_from(self.seed, self.epoch, index)):
            image, label = self.dataset[index]
        return image, checked_label(label, self.num_classes)

    @property
    def known_labels(self) -> list[int] | None:
        """Labels that image files and torchvision's datasets have."""
        labels = getattr(self.dataset, 'labels', getattr(self.dataset, 'targets', None))
        if labels is None or getattr(self.dataset, 'target_transform', None) is not None:
            return None
        found: list[int] = torch.as_tensor(labels).tolist()
        return found


class Splits(NamedTuple):
    """What a model is trained and tested on.

    Attributes:
        train: samples that differ from epoch to epoch.
        test: samples that never differ.
        label_names: the name of each class.
        multi_label: whether an image can be of any number of classes; labels are then ``(classes,)`` of 0 and 1.
        test_name: what people call the test data.
    """

    train: Samples
    test: Samples
    label_names: tuple[str, ...]
    multi_label: bool = False
    test_name: str = 'test'


def micro_batches(order: Sequence[int], batch_size: int, split: BatchSplit = WHOLE) -> list[Sequence[int]]:
    """Indices of one process' micro-batches: those of all processes together are the batches of one alone.

    What does not fill a last batch is left out.
    """
    starts = range(0, len(order) - batch_size + 1, batch_size)
    own = range(split.rank * split.accumulated, (split.rank + 1) * split.accumulated)
    return [order[start + part : start + batch_size : split.parts] for start in starts for part in own]


def checked_label(label: Any, num_classes: int | None) -> Any:
    """A label as an integer, which a loss on a GPU could only reject by ending the process; or one for each class."""
    if isinstance(label, Tensor) and label.dim() > 0:
        return label
    number = int(label)
    if num_classes is not None and not 0 <= number < num_classes:
        raise ValueError(f'expected labels from 0 to {num_classes - 1}, got {number}: see --num-classes')
    return number


def seed_from(*entropy: int) -> int:
    """Mix integers >= 0 into one 63-bit seed."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of the CPU for what runs inside, and put them back to what they were.

    The random transforms of torchvision and timm draw from them.
    """
    before = random.getstate(), np.random.get_state()  # noqa: NPY002  timm draws from NumPy's too
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002

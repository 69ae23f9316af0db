"""Samples whose randomness is a function of seed, epoch and index."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Sample = tuple[Tensor, int]


def seed_from(*entropy: int) -> int:
    """Mix integers >= 0 into one 63-bit seed."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def checked_label(label: Any, num_classes: int | None) -> int:
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
    """The samples of another dataset, each transformed under a seed of its own, so that workers do not matter.

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
        return image, checked_label(label, self.num_classes)


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

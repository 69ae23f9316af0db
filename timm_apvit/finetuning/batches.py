"""Samples and batches of them: what a model sees in an epoch is a function of the seed and the epoch."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler

from timm_apvit.finetuning.samples import Sample, Samples, seed_from
from timm_apvit.finetuning.streams import Stream

AnySamples = Samples | Stream


class Splits(NamedTuple):
    """What a model is trained and tested on.

    Attributes:
        train: samples that differ from epoch to epoch.
        test: samples that never differ.
        label_names: the name of each class.
    """

    train: AnySamples
    test: AnySamples
    label_names: tuple[str, ...]


class Division(NamedTuple):
    """How the batch of an update is divided among processes, and within each into micro-batches.

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


class MicroBatches(Sampler[list[int]]):
    """Indices of the micro-batches of one process: those of all processes together are the batches of one alone.

    Args:
        order: of the samples of an epoch; what does not fill a last batch is left out.
        batch_size: of an update.
        division: of each batch.
        done: updates that are left out at the beginning.
    """

    def __init__(self, order: Sequence[int], batch_size: int, division: Division, done: int = 0) -> None:
        self.order, self.batch_size, self.division, self.done = order, batch_size, division, done

    def __len__(self) -> int:
        return (len(self.order) // self.batch_size - self.done) * self.division.accumulated

    def __iter__(self) -> Iterator[list[int]]:
        rank, _, accumulated = self.division
        for start in range(self.done * self.batch_size, len(self.order) - self.batch_size + 1, self.batch_size):
            batch = self.order[start : start + self.batch_size]
            for part in range(rank * accumulated, (rank + 1) * accumulated):
                yield list(batch[part :: self.division.parts])


def updates_per_epoch(samples: AnySamples, batch_size: int) -> int:
    """Updates of an epoch; a last, smaller batch is left out unless it is the only one."""
    return max(1, len(samples) // batch_size)


def batches_to_train(
    samples: AnySamples,
    epoch: int,
    batch_size: int,
    division: Division = Division(),  # noqa: B008  immutable
    done: int = 0,
    weights: Tensor | None = None,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Sample]:
    """Load an epoch's micro-batches ``(B, C, H, W)``, ``(B,)`` of this process, in an order of its own.

    Args:
        samples: to load; a stream has no end, and begins at its beginning.
        epoch: its number.
        batch_size: of an update, of all processes together.
        division: of each batch.
        done: updates that are left out at the beginning.
        weights: of the samples, by which they are drawn again and again; None: each comes once.
        workers: processes that load; 0: none but this one.
        pin_memory: for copies to a GPU.
    """
    samples.epoch = epoch
    if isinstance(samples, Stream):
        return samples.loader(max(1, batch_size // division.parts), workers, pin_memory)
    generator = torch.Generator().manual_seed(seed_from(samples.seed, epoch))
    if weights is None:
        order = torch.randperm(len(samples), generator=generator)
    else:
        order = torch.multinomial(weights, len(samples), replacement=True, generator=generator)
    batches = MicroBatches(order.tolist(), min(batch_size, len(samples)), division, done)
    return _loader(samples, batches, workers, pin_memory)


def batches_to_test(
    samples: AnySamples,
    batch_size: int,
    workers: int = 0,
    division: Division = Division(),  # noqa: B008
) -> DataLoader[Sample]:
    """Load this process' test images once, in order."""
    samples.epoch = 0
    if isinstance(samples, Stream):
        return samples.loader(batch_size, workers)
    batches = BatchSampler(range(division.rank, len(samples), division.world), batch_size, drop_last=False)
    return _loader(samples, batches, workers)


def _loader(samples: Samples, batches: Any, workers: int, pin_memory: bool = False) -> DataLoader[Sample]:
    # The loader would draw seeds of its workers from the global generator.
    own = torch.Generator()
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory, generator=own)


def some_samples(samples: AnySamples, number: int) -> list[Sample]:
    """At most so many samples: spread over data that can be indexed, the first ones of a stream."""
    if isinstance(samples, Stream):
        images, labels = next(iter(batches_to_test(samples, number)))
        return list(zip(images, labels.tolist(), strict=True))
    step = max(1, len(samples) // number)
    return [samples[index] for index in range(0, len(samples), step)][:number]

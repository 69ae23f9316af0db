"""Samples that are functions of (seed, epoch, index)."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from images import load_folder
from PIL import Image
from timm.data import create_transform

from timm_apvit.finetuning.clutter import Clutter, ClutteredObjects
from timm_apvit.finetuning.digits import load_embedded_digits
from timm_apvit.finetuning.samples import BatchSplit, Samples, SeededSamples, Splits, micro_batches


def epoch_of(samples: Samples, epoch: int, workers: int = 0, shuffle: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    if shuffle:
        batches = list(samples.training_batches(epoch, 2, workers=workers))
    else:
        samples.epoch = epoch
        batches = [(image[None], torch.tensor([label])) for image, label in (samples[n] for n in range(len(samples)))]
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


@pytest.mark.parametrize('source', ['folder', 'digits'])
def test_samples_depend_on_seed_epoch_and_index_alone(source: str, folder: Path) -> None:
    def load(seed: int) -> Splits:
        if source == 'folder':
            return load_folder(folder, seed)
        return load_embedded_digits(seed, (3, 24, 24), 6, 6)

    first, second = load(0), load(0)
    images, labels = epoch_of(first.train, 3)
    assert images.shape == (6, 3, 24, 24)
    epoch_of(second.train, 0)
    torch.rand(5)
    again, labels_again = epoch_of(second.train, 3)
    by_workers, _ = epoch_of(load(0).train, 3, workers=2)
    assert torch.equal(images, again)
    assert torch.equal(labels, labels_again)
    assert torch.equal(images, by_workers)
    for other in (epoch_of(first.train, 4)[0], epoch_of(load(1).train, 3)[0]):
        assert not torch.equal(images, other)
    # Not only in another order: other images.
    in_order = [epoch_of(first.train, epoch, shuffle=False)[0][0] for epoch in (0, 1)]
    assert not torch.equal(*in_order)
    tested = [epoch_of(load(seed).test, 0, shuffle=False)[0] for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in pairwise(tested))


def test_seeded_samples_leave_the_global_generators_alone(folder: Path) -> None:
    image = Image.open(folder / 'train/cat/0.jpg').copy()
    transform = create_transform((3, 24, 24), is_training=True, auto_augment='rand-m9-mstd0.5')

    class Photographs:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return transform(image), index

    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    samples = SeededSamples(Photographs(), seed=1)
    assert torch.equal(samples[2][0], samples[2][0])
    assert not torch.equal(samples[2][0], samples[3][0])
    assert expected == (torch.rand(1), random.random(), np.random.rand())  # noqa: NPY002


def test_last_small_batch_is_dropped_in_training_only() -> None:
    splits = load_embedded_digits(0, (1, 16, 16), 7, 7)
    assert [len(labels) for _, labels in splits.train.training_batches(0, 3)] == [3, 3]
    assert [len(labels) for _, labels in splits.train.training_batches(0, 8)] == [7]
    assert [len(labels) for _, labels in splits.test.test_batches(3)] == [3, 3, 1]


@pytest.mark.parametrize(('world', 'accumulated'), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_micro_batches_of_all_processes_are_the_batches_of_one(world: int, accumulated: int) -> None:
    order = torch.randperm(26).tolist()
    divided = [list(micro_batches(order, 6, BatchSplit(rank, world, accumulated))) for rank in range(world)]
    for update in range(4):
        parts = [part for own in divided for part in own[update * accumulated : (update + 1) * accumulated]]
        assert {len(part) for part in parts} == {6 // (world * accumulated)}
        assert sorted(index for part in parts for index in part) == sorted(order[update * 6 : update * 6 + 6])


def test_what_was_done_of_an_epoch_is_left_out() -> None:
    samples = load_embedded_digits(0, (1, 16, 16), 40, 7).train
    whole, rest = (list(samples.training_batches(2, 8, BatchSplit(0, 1, 2), done)) for done in (0, 3))
    assert len(rest) == 4
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[6:], rest, strict=True))


def test_weights_draw_samples_again_and_again() -> None:
    splits = load_embedded_digits(0, (1, 16, 16), 40, 7)
    weights = torch.zeros(40)
    weights[3] = 1.0
    images = torch.cat([images for images, _ in splits.train.training_batches(0, 8, weights=weights)])
    assert len(images) == 40
    assert torch.equal(images, splits.train[3][0].expand_as(images))


def test_a_digit_is_painted_whole_and_inside() -> None:
    digits = np.random.default_rng(0).uniform(0.1, 1, size=(5, 8, 8)).astype(np.float32)
    samples = ClutteredObjects(digits, np.arange(5), 50, 0, (1, 20, 32), (0.0,), (1.0,), Clutter((0.4, 0.4), 0))
    places = set()
    for n in range(len(samples)):
        image, label = samples[n]
        rows, columns = torch.nonzero(image[0], as_tuple=True)
        y, x = int(rows.min()), int(columns.min())
        # 0.4 of 20 pixels is the digit's own side, so that its pixels are those of the image.
        assert torch.equal(image[0, y : y + 8, x : x + 8], torch.from_numpy(digits[label]))
        assert torch.count_nonzero(image) == 64
        places.add((y, x))
    assert {0, 12} <= {y for y, _ in places}
    assert max(x for _, x in places) > 20


def test_clutter_is_made_of_pieces_that_are_no_whole_digits() -> None:
    digits = np.ones((5, 8, 8), np.float32)
    cluttered, bare = (
        ClutteredObjects(digits, np.arange(5), 1, 3, (1, 64, 64), (0.0,), (1.0,), Clutter((0.25, 0.25), pieces))
        for pieces in (4, 0)
    )
    assert bare[0][0].sum() == 16**2
    assert 16**2 < cluttered[0][0].sum() <= 16**2 + 4 * 8**2


def test_no_digit_is_both_trained_and_tested_on() -> None:
    train, test, names, *_ = load_embedded_digits(0, (3, 16, 16), 4, 4)
    assert isinstance(train, ClutteredObjects)
    assert isinstance(test, ClutteredObjects)
    assert len(train.objects) + len(test.objects) == 1797
    assert not {digit.tobytes() for digit in train.objects} & {digit.tobytes() for digit in test.objects}
    assert names == tuple('0123456789')
    other_seed = load_embedded_digits(9, (3, 16, 16), 4, 4).test
    assert isinstance(other_seed, ClutteredObjects)
    assert np.array_equal(other_seed.objects, test.objects)


def test_embedded_digits_are_normalised_by_channel() -> None:
    plain = load_embedded_digits(0, (3, 16, 16), 4, 4, mean=(0.0,), std=(1.0,)).test[0][0]
    image = load_embedded_digits(0, (3, 16, 16), 4, 4, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0)).test[0][0]
    expected = (plain - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    torch.testing.assert_close(image, expected)


@pytest.mark.parametrize(('number', 'expected'), [(2, [0, 3]), (4, [0, 1, 3, 5]), (9, [0, 1, 2, 3, 4, 5, 6])])
def test_some_are_spread_over_all_and_no_others_are_read(number: int, expected: list[int]) -> None:
    read: list[int] = []

    class Numbered(Samples):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            read.append(index)
            return torch.zeros(1, 1, 1), index

    _, labels = Numbered(7, 0).some(number)
    assert labels.tolist() == read == expected

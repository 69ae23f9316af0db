"""Mixup and cutmix, repeated alike for every piece of a batch."""

import numpy as np
import pytest
import torch
from tiny import SCHEDULE, a_batch

from timm_apvit.finetuning.mixing import Mixer
from timm_apvit.finetuning.sharing import mirrored_piece


@pytest.mark.parametrize('mixes', [{'mixup': 0.8}, {'cutmix': 1.0}, {'mixup': 0.8, 'cutmix': 1.0, 'smoothing': 0.1}])
def test_pieces_are_mixed_as_the_whole_batch_is(mixes: dict[str, float]) -> None:
    images, labels = a_batch(8)
    mixer = Mixer(SCHEDULE._replace(**mixes), 10)
    for update in range(4):
        mixed, targets = mixer(images.clone(), labels.clone(), update)
        assert not torch.equal(mixed, images)
        for number in range(2):
            piece = mirrored_piece(list(range(8)), number, 2)
            own_mixed, own_targets = mixer(images[piece], labels[piece], update)
            assert torch.equal(own_mixed, mixed[piece])
            assert torch.equal(own_targets, targets[piece])


def test_updates_mix_differently_and_leave_the_global_generator_alone() -> None:
    images, labels = a_batch(8)
    mixer = Mixer(SCHEDULE._replace(mixup=1.0), 10)
    np.random.seed(0)  # noqa: NPY002
    expected = np.random.rand()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    shares = {mixer(images.clone(), labels, update)[1].max().item() for update in range(5)}
    assert len(shares) == 5
    assert np.random.rand() == expected  # noqa: NPY002


def test_mixed_labels_are_smoothed_once() -> None:
    images, labels = a_batch(8)
    plain, mixing = (Mixer(SCHEDULE._replace(smoothing=0.2, mixup=alpha), 10) for alpha in (0.0, 1.0))
    assert plain.smoothing == 0.2
    assert plain(images, labels, 0)[1] is labels
    assert mixing.smoothing == 0.0
    targets = mixing(images, labels, 0)[1]
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
    torch.testing.assert_close(targets.min(), torch.tensor(0.02))

"""Masks that teach what looks where it matters, before a training and during it."""

import math

import pytest
import timm
import torch
from conftest import CROWDING, create

from timm_apvit.learning.saliency import fit_saliency, saliency_loss


def places(number, seed):
    """Images ``(B, 3, 96, 96)`` with two small bright squares, and where they are, ``(B, 12, 12)``."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.zeros(number, 12, 12)
    for each in target:
        for y, x in torch.randint(0, 11, (2, 2), generator=generator).tolist():
            each[y : y + 2, x : x + 2] = 1
    bright = target.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1)
    return 2 * bright + 0.5 * torch.randn(number, 3, 96, 96, generator=generator), target


def there_more_often(model):
    """How many more of the patches lie on things than of an even grid."""
    images, targets = places(64, 1)
    geometry = model.eval().patch_geometry(images)
    index = ((geometry.centres + 1) * 6).long().clamp(0, 11)
    there = targets[torch.arange(64)[:, None], index[..., 1], index[..., 0]].mean()
    return float(there / targets.mean())


def test_masks_teach_it_to_find_several_things():
    model = timm.create_model('test_apvit', **CROWDING)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    images, targets = places(192, 0)
    for x, target in zip(images.split(32) * 3, targets.split(32) * 3, strict=True):
        optimizer.zero_grad()
        saliency_loss(model.patch_geometry(x), target).backward()
        optimizer.step()
    assert there_more_often(model) > 2.5


def test_fitted_first_it_finds_before_the_vit_learns():
    model = timm.create_model('test_apvit', **CROWDING)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, targets = places(192, 0)
    last = fit_saliency(model, list(zip(images.split(32), targets.split(32), strict=True)), epochs=6)
    assert last < 0.8 * math.log(144)  # of an even guess
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all('localizer' in name for name in changed)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert there_more_often(model) > 2.5


def test_a_glance_learns_by_masks_too():
    model = timm.create_model('test_apvit', localizer={'name': 'glance', 'grid': 6}, num_patches=36, img_size=96)
    images, targets = places(192, 0)
    last = fit_saliency(model, list(zip(images.split(32), targets.split(32), strict=True)), epochs=5)
    assert last < 0.95 * math.log(36)
    assert all(parameter.grad is None for parameter in model.parameters())


IMAGES, ONES = torch.randn(2, 3, 96, 96), torch.ones(2, 4, 4)


@pytest.mark.parametrize(
    ('batches', 'arguments', 'message'),
    [
        ([], CROWDING, 'expected batches of images in each epoch, got none'),
        ([(IMAGES, ONES), (IMAGES, torch.ones(2))], CROWDING, 'expected a target'),
        (
            [(IMAGES, torch.ones(3, 4, 4))],
            CROWDING,
            r'a target for each image, got \[2, 3, 96, 96\] and \[3, 4, 4\]',
        ),
        ([(IMAGES, [[1.0]])], CROWDING, 'expected batches of two tensors'),
        ([IMAGES], CROWDING, 'expected batches of two tensors, images and targets, got Tensor'),
        ([(IMAGES[:, :1], ONES)], CROWDING, 'expected an image of shape'),
        ([(IMAGES, ONES), (IMAGES / 0, ONES)], CROWDING, 'expected a loss that is a finite number, got tensor.nan'),
        (iter([(IMAGES, ONES)]), CROWDING, 'expected batches that have a length and come again, .* got list_iterator'),
        ([(IMAGES, ONES)], {}, 'expected a localizer that says where it looks'),
    ],
)
def test_rejects_to_fit_what_cannot_be(batches, arguments, message):
    model = create(**arguments)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit_saliency(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rejects_to_fit_what_does_not_learn():
    with pytest.raises(ValueError, match='got float16'):
        fit_saliency(create(**CROWDING).half(), [(IMAGES, ONES)])
    with pytest.raises(ValueError, match='got all of them frozen'):
        fit_saliency(create(**CROWDING).requires_grad_(False), [(IMAGES, ONES)])
    model = create(**CROWDING).requires_grad_(False)
    model.patch_embed.patching.localizer.fields.requires_grad_(True)
    with pytest.raises(ValueError, match='expected a loss of parameters that learn, got one of none'):
        fit_saliency(model, [(IMAGES, ONES)])


@pytest.mark.parametrize('epochs', [0, -1, 1.5, 'a', True])
def test_rejects_epochs_that_are_none(epochs):
    with pytest.raises(ValueError, match=f'expected epochs to be an integer >= 1, got {epochs!r}'):
        fit_saliency(create(**CROWDING), [(IMAGES, ONES)], epochs=epochs)


@pytest.mark.parametrize(
    'target', [torch.ones(2, 4), torch.ones(3, 4, 4), torch.ones(2, 4, 4) / 0, -torch.ones(2, 4, 4)]
)
def test_rejects_targets(target):
    geometry = create(**CROWDING).patch_geometry(torch.randn(2, 3, 96, 96))
    with pytest.raises(ValueError, match='expected a target'):
        saliency_loss(geometry, target)
    with pytest.raises(ValueError, match=r'expected a geometry, as of model\.patch_geometry, got Tensor'):
        saliency_loss(target, target)


def test_images_without_things_teach_nothing():
    geometry = create(**CROWDING).patch_geometry(torch.randn(2, 3, 96, 96))
    target = torch.rand(2, 5, 7)
    alone = saliency_loss(geometry._replace(saliency=geometry.saliency[:1]), target[:1])
    target[1] = 0
    for scale in (1.0, 1e37, 1e-30):
        torch.testing.assert_close(saliency_loss(geometry, target * scale), alone)
    assert saliency_loss(geometry, torch.zeros(2, 5, 7)) == 0


@pytest.mark.parametrize('side', [20, 30, 40, 160])
def test_equal_things_weigh_alike_wherever_they_lie(side):
    model = create(**CROWDING)
    saliency = torch.zeros(1, 12, 12)
    saliency[:, :6] = 3.0
    geometry = model.patch_geometry(torch.randn(1, 3, 96, 96))._replace(saliency=saliency)
    losses = []
    for y in (0, 1 + side // 2):  # in the upper half and in the lower one
        target = torch.zeros(1, side, side)
        target[:, y, ::7] = 1.0
        alone = float(saliency_loss(geometry, target))
        target[:, :2] = target[:, :2] + (torch.arange(side) % 7 == 0) * (y > 1)
        losses.append((alone, float(saliency_loss(geometry, target))))
    (upper, _), (lower, both) = losses
    assert lower == pytest.approx(upper + 3.0, abs=1e-4)
    # Two things above and one below.
    assert both == pytest.approx((2 * upper + lower) / 3, abs=1e-4)


def test_a_batch_of_no_images_teaches_nothing():
    geometry = create(**CROWDING).patch_geometry(torch.randn(0, 3, 96, 96))
    assert saliency_loss(geometry, torch.zeros(0, 20, 20)) == 0

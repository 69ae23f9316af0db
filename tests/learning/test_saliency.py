"""Masks that teach a glance where to look, before a training and during it."""

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


def test_masks_teach_a_glance_to_find_several_things():
    model = timm.create_model('test_apvit', **{**CROWDING, 'localizer': {'name': 'glance', 'crowd': 0.8, 'grid': 6}})
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    images, targets = places(192, 0)
    for x, target in zip(images.split(32) * 3, targets.split(32) * 3, strict=True):
        optimizer.zero_grad()
        saliency_loss(model.patch_geometry(x), target).backward()
        optimizer.step()
    images, targets = places(64, 1)
    geometry = model.eval().patch_geometry(images)
    index = ((geometry.centres + 1) * 6).long().clamp(0, 11)
    there = targets[torch.arange(64)[:, None], index[..., 1], index[..., 0]].mean()
    evenly = targets.mean()
    assert there > 2.5 * evenly


def test_fitted_first_it_finds_before_the_vit_learns():
    model = timm.create_model('test_apvit', **{**CROWDING, 'localizer': {'name': 'glance', 'crowd': 0.8, 'grid': 6}})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, targets = places(192, 0)
    last = fit_saliency(model, zip(images.split(32), targets.split(32), strict=True), epochs=10)
    assert last < 0.7 * math.log(36)  # of an even guess
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all('localizer' in name for name in changed)
    images, targets = places(64, 1)
    assert saliency_loss(model.eval().patch_geometry(images), targets) < 0.8 * math.log(36)


@pytest.mark.parametrize(
    ('batches', 'arguments', 'message'),
    [
        ([], CROWDING, 'expected batches of images, got none'),
        ([(torch.randn(2, 3, 96, 96), torch.ones(2))], CROWDING, 'expected a target'),
        (
            [(torch.randn(2, 3, 96, 96), torch.ones(3, 4, 4))],
            CROWDING,
            r'expected a target \(2, h, w\), got \(3, 4, 4\)',
        ),
        ([(torch.randn(2, 3, 96, 96), [[1.0]])], CROWDING, 'expected a target'),
        ([(torch.randn(2, 3, *size), torch.ones(2, 4, 4)) for size in ((96, 96), (192, 96))], CROWDING, 'one size'),
        ([(torch.randn(2, 3, 96, 96), torch.ones(2, 4, 4))], {}, "expected a model with localizer='glance'"),
    ],
)
def test_rejects_to_fit_what_cannot_be(batches, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_saliency(create(**arguments), batches)


@pytest.mark.parametrize(
    'target', [torch.ones(2, 4), torch.ones(3, 4, 4), torch.ones(2, 4, 4) / 0, -torch.ones(2, 4, 4)]
)
def test_rejects_targets(target):
    geometry = create(**CROWDING).patch_geometry(torch.randn(2, 3, 96, 96))
    with pytest.raises(ValueError, match='expected a target'):
        saliency_loss(geometry, target)
    with pytest.raises(ValueError, match=r'expected a geometry of a localizer that says .*, got Tensor'):
        saliency_loss(target, target)


def test_images_without_things_teach_nothing():
    geometry = create(**CROWDING).patch_geometry(torch.randn(2, 3, 96, 96))
    target = torch.rand(2, 5, 7)
    alone = saliency_loss(geometry._replace(saliency=geometry.saliency[:1]), target[:1])
    target[1] = 0
    for scale in (1.0, 1e37, 1e-30):
        torch.testing.assert_close(saliency_loss(geometry, target * scale), alone)
    assert saliency_loss(geometry, torch.zeros(2, 5, 7)) == 0

"""Patches that crowd where a glance says, and tile the image still."""

import math

import pytest
import timm
import torch
from conftest import create, randomise
from torch import nn

import timm_apvit
from timm_apvit import TRANSFORMS, Localizer, Look, register_localizer
from timm_apvit.learning.adaptation import adaptation, stood_still
from timm_apvit.learning.glance import collapsed
from timm_apvit.learning.saliency import fit_saliency, saliency_loss
from timm_apvit.patching.anchors import _inverse_cdf, resolve_layout
from timm_apvit.patching.coords import sample_grid
from timm_apvit.patching.geometry import footprint, patch_jacobians

CPU = torch.device('cpu')
COARSE_FINE = {'name': 'coarse_fine', 'coarse': 4, 'fine': [3, 3], 'coarse_motion': 0.0}
CROWD = 0.6
CROWDING = {'localizer': {'name': 'glance', 'crowd': CROWD, 'grid': 6}, 'num_patches': 36, 'img_size': 96}


def density(*size, seed=0):
    """Of few places, and at least what a crowd leaves."""
    peaks = torch.rand(size, generator=torch.Generator().manual_seed(seed)) ** 8
    return CROWD * peaks / peaks.mean(dim=(1, 2), keepdim=True) + 1 - CROWD


def test_inverse_is_where_a_share_lies_before():
    weights = torch.tensor([[1.0, 1.0, 2.0], [4.0, 1.0, 1.0]])
    share = torch.tensor([[0.0, 0.25, 0.75, 1.0], [0.0, 1 / 3, 5 / 6, 1.0]])
    expected = torch.tensor([[0.0, 1 / 3, 5 / 6, 1.0], [0.0, 1 / 6, 2 / 3, 1.0]])
    torch.testing.assert_close(_inverse_cdf(weights.unsqueeze(1), share), expected)


@pytest.mark.parametrize('num', [1, 7, (3, 5), 196, {'name': 'coarse_fine', 'coarse': 7, 'fine': [3, 4]}])
def test_an_even_density_leaves_anchors_where_they_are(num):
    anchors = resolve_layout(num, (1, 1)).anchors(CPU)
    crowded = anchors.crowded(torch.full((2, 5, 7), 3.0), 0.4)
    for ours, theirs in zip(crowded[:2], anchors[:2], strict=True):
        torch.testing.assert_close(ours, theirs.expand(2, -1, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize('num', [1, 7, (3, 5), 64])
def test_they_tile_the_image_in_rows_of_equal_shares(num):
    rows = resolve_layout(num, (1, 1)).grids[0]
    held = density(3, 6, 9)
    anchors = rows.anchors(CPU).crowded(held, 1 - CROWD)
    low, high = anchors.centres - anchors.extents, anchors.centres + anchors.extents
    assert anchors.extents.min() > 0
    torch.testing.assert_close(anchors.extents.prod(dim=-1).sum(dim=1), torch.ones(3))
    first = 0
    for number, length in enumerate(rows.lengths):
        own = slice(first, first + length)
        first += length
        assert (low[:, own, 1] == low[:, own.start, None, 1]).all()
        torch.testing.assert_close(high[:, own, 0][:, :-1], low[:, own, 0][:, 1:])
        torch.testing.assert_close(low[:, own.start, 0], torch.full((3,), -1.0))
        torch.testing.assert_close(high[:, own.stop - 1, 0], torch.full((3,), 1.0))
        # What of the density lies above the row, by a fine sum.
        fine = held.sum(dim=2).repeat_interleave(2000, 1)
        above = fine.cumsum(dim=1) / fine.sum(dim=1, keepdim=True)
        index = ((high[:, own.start, 1] + 1) / 2 * fine.shape[1]).long().clamp(max=fine.shape[1] - 1)
        share = rows.anchors(CPU).centres[own.start, 1] + rows.anchors(CPU).extents[own.start, 1]
        assert (above[torch.arange(3), index] - (share + 1) / 2).abs().max() < 1e-3, number


def test_patches_are_small_where_the_density_is_and_none_too_large():
    anchors = resolve_layout((8, 8), (1, 1)).anchors(CPU)
    held = torch.full((1, 8, 8), 1 - CROWD)
    held[0, 1, 6] += CROWD * 64
    crowded = anchors.crowded(held, 1 - CROWD)
    there = (crowded.centres[0] - torch.tensor([0.625, -0.625])).abs().amax(dim=-1) < 0.125
    assert there.sum() >= 8  # of one before
    least = 1 - CROWD
    assert crowded.extents.max() * 8 <= (1 + least) / least


def test_what_may_not_move_stays():
    anchors = resolve_layout(COARSE_FINE, (1, 1)).anchors(CPU)
    crowded = anchors.crowded(density(2, 5, 5), 1 - CROWD)
    every = anchors._replace(motion=None).crowded(density(2, 5, 5), 1 - CROWD)
    assert torch.equal(every.centres[:, 4:], crowded.centres[:, 4:])
    assert (every.extents[:, :4] != anchors.extents[:4]).any()
    assert torch.equal(crowded.centres[:, :4], anchors.centres[:4].expand(2, -1, -1))
    assert torch.equal(crowded.extents[:, :4], anchors.extents[:4].expand(2, -1, -1))
    assert ((crowded.centres[:, 4:] - anchors.centres[4:]).abs().amax(dim=(1, 2)) > 0.05).all()


@pytest.mark.parametrize('crowd', [-0.1, 0.95, 'all', True])
def test_rejects_a_crowd_that_is_none(crowd):
    with pytest.raises(ValueError, match=r'expected crowd to be a finite number within \[0, 0.9\]'):
        create(localizer={'name': 'glance', 'crowd': crowd})


@pytest.mark.parametrize('training', [False, True])
def test_a_new_one_is_the_vit(training):
    vit = timm.create_model('test_vit').eval()
    model = timm_apvit.adapt(vit, localizer={'name': 'glance', 'crowd': CROWD}).train(training)
    x = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(model(x), vit(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize('transform', TRANSFORMS)
def test_patches_start_from_there_and_the_vit_is_told_their_places_in_the_layout(transform):
    model = timm.create_model('test_apvit', **CROWDING, transform=transform).eval()
    nn.init.normal_(model.patch_embed.patching.localizer.classes[-1].weight)
    x = torch.randn(3, 3, 96, 96)
    seen = model.patch_embed(x)
    anchors = seen.layout.anchors(CPU)
    laid = seen.geometry.started
    torch.testing.assert_close(seen.geometry.centres, laid.centres, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.positions, anchors.centres.expand(3, -1, -1), rtol=0, atol=1e-4)
    assert (laid.centres - anchors.centres).abs().max() > 0.1
    randomise(model)
    moved = model.patch_embed(x).geometry
    assert (moved.centres - moved.started.centres).abs().max() > 1e-3
    # As many levels as the largest of them need.
    size, patching = (96, 96), model.patch_embed.patching
    jacobians = patch_jacobians(moved, sample_grid((16, 16), CPU))
    limit = patching.transform.max_footprint(patching.layout, size, (16, 16)) * (1 + 0.4) / 0.4
    assert footprint(jacobians, size, (16, 16)).max() <= limit


class Left(Localizer):
    """Nine patches of ten in the left half, of those that crowd."""

    crowd = 0.5

    def __init__(self, fields, **_):
        super().__init__()
        self.widths = fields

    def level(self, image_size):
        return 0

    def look(self, pyramid):
        return Look(len(pyramid[0]), density=torch.tensor([[[9.0, 1.0]]]).expand(len(pyramid[0]), 1, 2))

    def forward(self, look, anchors):
        return {name: torch.zeros(look.memory, len(anchors.motion), n) for name, n in self.widths.items()}


@pytest.fixture
def left():
    register_localizer('left', Left)


@pytest.mark.usefixtures('left')
def test_a_localizer_of_ones_own_says_how_many_follow_it_and_some_images_are_seen_evenly_in_training():
    model = create(localizer='left', num_patches=(1, 100), whole_share=0.5)
    x = torch.randn(200, 3, 32, 32)
    count = (model.eval().patch_geometry(x).centres[..., 0] < 0).sum(dim=1)
    assert (count == 70).all()  # half of 90 and of 50
    count = (model.train().patch_geometry(x).centres[..., 0] < 0).sum(dim=1)
    assert set(count.tolist()) == {50, 70}
    assert (count == 50).float().mean() == pytest.approx(0.5, abs=0.12)


@pytest.mark.usefixtures('left')
@pytest.mark.parametrize(
    ('crowd', 'look', 'message'),
    [
        (0.0, {}, 'a crowd within'),
        (1.0, {}, 'a crowd within'),
        (0.5, {'window': torch.tensor([[0.0, 0.0, 0.5]])}, 'no window'),
        (0.5, {'density': torch.ones(1, 4)}, 'density of the localizer'),
        (0.5, {'density': torch.ones(2, 4, 4)}, 'density of the localizer'),
    ],
)
def test_rejects_looks_that_no_crowd_can_follow(crowd, look, message, monkeypatch):
    model = create(localizer='left', num_patches=4)
    localizer = model.patch_embed.patching.localizer
    seen = localizer.look([torch.zeros(1, 3, 32, 32)])._replace(**look)
    monkeypatch.setattr(localizer, 'look', lambda pyramid: seen)
    monkeypatch.setattr(localizer, 'crowd', crowd, raising=False)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, 3, 32, 32))


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
    assert there > 2.5 * evenly  # of things in two places, in rows that must cross the image: not 0.8 / evenly


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


@pytest.mark.usefixtures('left')
def test_rejects_a_localizer_that_does_not_look():
    geometry = create(localizer='left').patch_geometry(torch.randn(2, 3, 96, 96))
    with pytest.raises(ValueError, match='says where it looks'):
        saliency_loss(geometry, torch.ones(2, 4, 4))


@pytest.mark.slow
def test_it_comes_back_compiles_and_exports(tmp_path):
    model = randomise(create(**CROWDING, num_classes=3)).eval()
    x = torch.randn(2, 3, 96, 96)
    timm_apvit.save_pretrained(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    torch.testing.assert_close(again(x), model(x))
    torch.testing.assert_close(torch.compile(model, backend='eager', fullgraph=True)(x), model(x))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=2)},))
    torch.testing.assert_close(program.module()(x[[0, 1, 0]]), model(x[[0, 1, 0]]))


def test_a_glance_that_finds_nothing_is_told():
    x = torch.randn(8, 3, 96, 96)
    model = timm.create_model('test_apvit', **CROWDING)
    assert collapsed(model, x) == 'The glance finds nothing yet: all places matter alike.'
    assert stood_still(adaptation(model, x))
    assert collapsed(randomise(model), x) is None
    assert not stood_still(adaptation(model, x))


def test_labels_alone_teach_it():
    model = timm.create_model('test_apvit', **CROWDING, num_classes=2).train()
    x, labels = torch.randn(8, 3, 96, 96), torch.arange(8) % 2
    nn.functional.cross_entropy(model(x), labels).backward()
    assert model.patch_embed.patching.localizer.classes[-1].weight.grad.abs().sum() > 0
    assert timm_apvit.fit_glance(model, [(x, labels)] * 2, epochs=2) < 1

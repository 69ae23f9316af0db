"""Patches that crowd where it matters, and tile the image still."""

import warnings

import pytest
import timm
import torch
from conftest import CROWD, CROWDING, create, randomise
from torch import nn

import timm_apvit
from timm_apvit import TRANSFORMS, Localizer, Look, register_localizer
from timm_apvit.export import export_model
from timm_apvit.hub.card import model_card
from timm_apvit.learning.adaptation import adaptation, stood_still
from timm_apvit.learning.saliency import saliency_loss
from timm_apvit.models.patch_embed import geometry_features
from timm_apvit.patching.anchors import divided, resolve_layout
from timm_apvit.patching.coords import sample_grid
from timm_apvit.patching.geometry import footprint, patch_jacobians
from timm_apvit.pictures.plots import default_budgets
from timm_apvit.pictures.views import leaf_mosaic, view_patches

CPU = torch.device('cpu')
COARSE_FINE = {'name': 'coarse_fine', 'coarse': 4, 'fine': [4, 4]}


def density(*size, seed=0):
    """Of few places, and at least what a crowd leaves."""
    peaks = torch.rand(size, generator=torch.Generator().manual_seed(seed)) ** 8
    return CROWD * peaks / peaks.mean(dim=(1, 2), keepdim=True) + 1 - CROWD


@pytest.mark.parametrize('num', [4, (4, 6), (2, 10), 64, 196])
def test_an_even_density_leaves_the_grid_as_it_is(num):
    layout = resolve_layout(num, (1, 1))
    for size in ((5, 7), (1, 1), (20, 20)):
        for ours, theirs in zip(divided(layout, torch.full((2, *size), 3.0))[:2], layout.anchors(CPU)[:2], strict=True):
            assert torch.equal(ours, theirs.expand(2, -1, -1))


@pytest.mark.parametrize(('num', 'size'), [(4, (5, 5)), ((4, 6), (6, 9)), (64, (12, 10)), (100, (30, 40))])
def test_the_leaf_that_holds_most_is_divided_each_time(num, size):
    layout, held = resolve_layout(num, (1, 1)), density(2, *size)
    (height, width), anchors = layout.grids[0].grid, divided(layout, held)
    for image in range(2):
        # Pixels of which every leaf and every cell of the density has a whole number.
        pixels = held[image].double().repeat_interleave(8 * height, 0).repeat_interleave(8 * width, 1)

        def mass(leaf, pixels=pixels):
            top, left, h, w = (round(each * n) for each, n in zip(leaf, 2 * pixels.shape, strict=True))
            return float(pixels[top : top + h, left : left + w].sum())

        leaves = [(2 * y / height, 2 * x / width, 2 / height, 2 / width)
                  for y in range(height // 2) for x in range(width // 2)]  # fmt: skip
        while len(leaves) < layout.num_patches:
            top, left, h, w = largest = max((each for each in leaves if each[2] * height > 0.5), key=mass)
            leaves.remove(largest)
            leaves += [(top + y * h / 2, left + x * w / 2, h / 2, w / 2) for y in range(2) for x in range(2)]
        expected = sorted((2 * x + w - 1, 2 * y + h - 1, w, h) for y, x, h, w in leaves)
        found = sorted(map(tuple, torch.cat([anchors.centres[image], anchors.extents[image]], dim=1).tolist()))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-6)


def test_of_leaves_that_hold_the_same_the_first_are_divided_and_what_is_no_number_tells_of_itself():
    layout = resolve_layout(64, (1, 1))
    held = torch.full((1, 1, 2), 0.1)
    held[..., 1] = 1.9  # all eight blocks on the right, then eight of their 32 quarters
    anchors = divided(layout, held)
    quarters = anchors.centres[anchors.extents[..., 0] == 1 / 16]
    assert len(quarters) == 4 * 8
    assert quarters[:, 1].max() < -0.5  # row by row from the top
    assert divided(layout, held[:0]).centres.shape == (0, 64, 2)
    assert divided(layout, held / 0 * 0).centres.isnan().all()


def test_patches_are_small_where_the_density_is_and_tile_the_image():
    held = torch.full((1, 8, 8), 1 - CROWD)
    held[0, 1, 6] += CROWD * 64
    crowded = divided(resolve_layout((8, 8), (1, 1)), held)
    there = (crowded.centres[0] - torch.tensor([0.625, -0.625])).abs().amax(dim=-1) < 0.125
    assert there.sum() == 16  # of one before
    assert crowded.extents.max() == 1 / 4
    assert crowded.extents.prod(dim=-1).sum() == 1


@pytest.mark.parametrize(
    ('num', 'message'),
    [
        (49, r'even number of rows and of columns for patches that crowd, such as \(8, 8\), got 49 in 7 rows'),
        ((4, 3), 'got 12 in 4 rows'),
        (10, 'got 10 in 3 rows'),
        (COARSE_FINE, 'expected num_patches of one grid .*, got 20 in 2 and 4 rows'),
    ],
)
def test_rejects_numbers_of_patches_that_are_no_even_grid(num, message):
    model = create(**CROWDING)
    with pytest.raises(ValueError, match=message):
        model.set_num_patches(num)
    assert model.num_patches == 36
    with pytest.raises(ValueError, match='got 36 in 4 rows'):
        model.set_input_size((64, 160))
    model(torch.randn(1, 3, 96, 96))


def test_a_default_number_of_patches_is_the_nearest_even_grid():
    model = create(localizer='saliency', img_size=(80, 176), dynamic_img_size=True)  # whose own grid is 5 x 11
    assert model.num_patches == 4 * 12
    model.set_input_size((16, 112))
    assert model.num_patches == 2 * 8
    assert model.forward_features(torch.randn(1, 3, 16, 112)).shape[1] == 16 + model.num_prefix_tokens
    assert model.forward_features(torch.randn(1, 3, 144, 96)).shape[1] == 8 * 6 + model.num_prefix_tokens


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('name', ['test_vit', 'test_vit3'])
def test_a_new_one_is_the_vit(name, training):
    vit = timm.create_model(name).eval()
    model = timm_apvit.adapt(vit, localizer='saliency').train(training)
    x = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(model(x), vit(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize('transform', TRANSFORMS)
def test_patches_start_from_there_and_the_vit_is_told_their_places(transform):
    model = timm.create_model('test_apvit', **CROWDING, transform=transform).eval()
    nn.init.normal_(model.patch_embed.patching.localizer.score.weight)
    x = torch.randn(3, 3, 96, 96)
    seen = model.patch_embed(x)
    anchors = seen.layout.anchors(CPU)
    laid = seen.geometry.started
    torch.testing.assert_close(seen.geometry.centres, laid.centres, rtol=0, atol=1e-5)
    assert torch.equal(seen.positions, seen.geometry.centres)
    assert (laid.centres - anchors.centres).abs().max() > 0.1
    features = geometry_features(seen.geometry, anchors, (6, 6))
    assert features[..., 2:].abs().max() < 1e-4  # where they started; how large they are is told
    assert features[..., 0].unique().numel() > 1
    randomise(model)
    moved = model.patch_embed(x).geometry
    assert (moved.centres - moved.started.centres).abs().max() > 1e-3
    # As many levels as the largest of them need.
    size, patching = (96, 96), model.patch_embed.patching
    jacobians = patch_jacobians(moved, sample_grid((16, 16), CPU))
    limit = patching.transform.max_footprint(patching.layout, size, (16, 16)) * 2
    assert footprint(jacobians, size, (16, 16)).max() <= limit


class Left(Localizer):
    """Nine tenths of the density in the left half."""

    crowd = 0.9

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
def test_a_localizer_of_ones_own_makes_them_crowd_and_some_images_are_seen_evenly_in_training(monkeypatch):
    model = create(localizer='left', num_patches=64, whole_share=0.5)
    x = torch.randn(200, 3, 32, 32)
    count = (model.eval().patch_geometry(x).centres[..., 0] < 0).sum(dim=1)
    assert (count == 56).all()  # of the eight blocks of two by two on the right none is divided
    count = (model.train().patch_geometry(x).centres[..., 0] < 0).sum(dim=1)
    assert set(count.tolist()) == {32, 56}
    assert (count == 32).float().mean() == pytest.approx(0.5, abs=0.12)
    monkeypatch.setattr(Left, 'crowd', 0.5)  # less than four times as dense
    assert ((model.eval().patch_geometry(x).centres[..., 0] < 0).sum(dim=1) == 32).all()


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


@pytest.mark.usefixtures('left')
def test_rejects_a_localizer_that_does_not_look():
    geometry = create(localizer='left').patch_geometry(torch.randn(2, 3, 96, 96))
    with pytest.raises(ValueError, match='says where it looks'):
        saliency_loss(geometry, torch.ones(2, 4, 4))


def test_pictures_show_each_patch_in_its_leaf():
    model = timm.create_model('test_apvit', **CROWDING).eval()
    nn.init.normal_(model.patch_embed.patching.localizer.score.weight)
    y, x = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 96), indexing='ij')
    view = view_patches(model, torch.stack([x, y, (x + y) / 2]))
    assert view.leaves[1].unique().numel() > 1
    shown = leaf_mosaic(view.patches, *view.leaves)
    small = nn.functional.interpolate(shown.movedim(2, 0)[None], (96, 96), mode='area')[0].movedim(0, 2)
    assert (small - view.pixels).abs().max() < 0.05
    assert default_budgets(timm.create_model('test_apvit', **{**CROWDING, 'num_patches': 64})) == [(2, 2), (4, 4), 64]
    assert default_budgets(timm.create_model('test_apvit', **{**CROWDING, 'num_patches': None})) == [
        (2, 2),
        (4, 4),
        (6, 6),
    ]
    assert 'set_num_patches' not in model_card(model, 'me/crowd')
    assert '| patches | 36, or any other even grid |' in model_card(model, 'me/crowd')


@pytest.mark.slow
def test_it_comes_back_compiles_and_exports(tmp_path):
    model = randomise(create(**CROWDING, num_classes=3)).eval()
    x = torch.randn(2, 3, 96, 96)
    timm_apvit.save_pretrained(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    torch.testing.assert_close(again(x), model(x))
    torch.testing.assert_close(torch.compile(model, backend='eager', fullgraph=True)(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of what a trace makes constant
        traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x[[1, 0]]), model(x[[1, 0]]))
    # Checked, on batches of several sizes; onnxruntime breaks ties in a way of its own.
    export_model(model, tmp_path / 'model.pt2')
    pytest.importorskip('onnxruntime')
    export_model(model, tmp_path / 'model.onnx')


def test_what_finds_nothing_is_told():
    x = torch.randn(8, 3, 96, 96)
    model = timm.create_model('test_apvit', **CROWDING)
    assert stood_still(adaptation(model, x))
    assert not stood_still(adaptation(randomise(model), x))

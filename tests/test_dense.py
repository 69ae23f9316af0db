"""Dense maps: tokens put back where they looked."""

import itertools
import math

import pytest
import skimage.data
import timm
import torch
import torch.nn.functional as F
from conftest import move_patches, vit_and_apvit

from timm_apvit.models.dense import dense_map, overlaps, splat_weights
from timm_apvit.patching.anchors import Rows
from timm_apvit.patching.geometry import place_inside

CPU = torch.device('cpu')


def random_geometry(batch=2, num=9, rotation=1.0):
    centres, extents = torch.rand(batch, num, 2) * 2 - 1, torch.rand(batch, num, 2) * 0.3 + 0.05
    angles, shear = rotation * torch.randn(batch, num), 0.2 * torch.randn(batch, num)
    return place_inside(centres, extents, angles, shear * (rotation > 0), (40, 60))


def grid_geometry(grid):
    centres, extents, _ = Rows(grid[0] * grid[1], grid[0]).anchors(CPU)
    zero = torch.zeros(1, len(centres))
    return place_inside(centres[None], extents[None], zero, zero, (48, 80))


@pytest.mark.parametrize('grid', [(4, 5), (1, 1), (7, 3)])
def test_identity_where_the_anchors_are_the_grid(grid):
    tokens = torch.randn(1, grid[0] * grid[1], 8)
    maps = dense_map(tokens, splat_weights(grid_geometry(grid), grid), grid)
    expected = tokens.transpose(1, 2).reshape(1, 8, *grid)
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-5)


def test_half_the_grid_is_nearest_upsampling_and_twice_the_grid_is_averaging():
    tokens = torch.randn(1, 4, 3)
    up = dense_map(tokens, splat_weights(grid_geometry((2, 2)), (4, 4)), (4, 4))
    expected = tokens.transpose(1, 2).reshape(1, 3, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up, expected, rtol=0, atol=1e-5)
    tokens = torch.randn(1, 16, 3)
    down = dense_map(tokens, splat_weights(grid_geometry((4, 4)), (2, 2)), (2, 2))
    expected = F.avg_pool2d(tokens.transpose(1, 2).reshape(1, 3, 4, 4), 2)
    torch.testing.assert_close(down, expected, rtol=0, atol=1e-5)


def shares(geometry, grid):
    """What each patch is of each cell: maps ``(B, N, h, w)`` of tokens that are a patch's own number."""
    batch, num = geometry.centres.shape[:2]
    return dense_map(torch.eye(num).expand(batch, -1, -1), splat_weights(geometry, grid), grid)


def turned(centres, extents, angles=None):
    """Patches of square images, ``(N, 2)`` and ``(N, 2)``."""
    centres, extents = torch.tensor([centres]), torch.tensor([extents])
    zero = torch.zeros(centres.shape[:2])
    return place_inside(centres, extents, zero if angles is None else torch.tensor([angles]), zero, (64, 64))


@pytest.fixture(params=['pairs', 'all'])
def listing(request, monkeypatch):
    """Pairs of a patch and a cell, as they are found, and all of them, as under a compiler."""
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: request.param == 'all')


@pytest.mark.parametrize('grid', [(1, 1), (5, 9), (14, 14)])
def test_constant_tokens_give_a_constant_map_and_every_cell_a_value(grid, listing):
    assert (shares(random_geometry(), grid) >= 0).all()
    maps = dense_map(torch.full((2, 9, 3), 5.0), splat_weights(random_geometry(), grid), grid)
    torch.testing.assert_close(maps, torch.full_like(maps, 5.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize(('rotation', 'tolerance'), [(0.0, 0.02), (1.0, 0.2)])
def test_weights_are_overlap_times_density_against_painting(rotation, tolerance, listing):
    """Paint patches on a fine raster: the mean coverage of a cell is its share (near it, where a patch is turned)."""
    geometry, grid, fine = random_geometry(1, 6, rotation), (3, 4), 100
    centres = Rows(grid[0] * fine * grid[1] * fine, grid[0] * fine).anchors(CPU).centres
    offset = centres[:, None] - geometry.centres[0]
    local = torch.linalg.solve(geometry.image_from_patch[0], offset[..., None])[..., 0]
    painted = (local.abs() <= 1).all(dim=-1).float().reshape(grid[0], fine, grid[1], fine, 6).mean(dim=(1, 3))
    painted = painted.reshape(-1, 6) / torch.linalg.det(geometry.image_from_patch[0])
    covered = painted.sum(dim=-1) > 0.1
    expected = painted[covered] / painted[covered].sum(dim=-1, keepdim=True)
    assert covered.sum() >= 4
    share = shares(geometry, grid)[0].flatten(1).T[covered]
    assert (share - expected).abs().sum(dim=-1).mean() <= tolerance


def test_pairs_are_all_that_touch_and_cost_what_they_touch(monkeypatch):
    for rotation, grid in itertools.product((0.0, 1.0), [(1, 1), (3, 2), (12, 20), (40, 60)]):
        geometry = random_geometry(3, 20, rotation)
        found = splat_weights(geometry, grid)
        maps = shares(geometry, grid)
        with monkeypatch.context() as patched:
            patched.setattr(torch.compiler, 'is_compiling', lambda: True)
            torch.testing.assert_close(shares(geometry, grid), maps, rtol=0, atol=1e-5)
            torch.testing.assert_close(splat_weights(geometry, grid).coverage, found.coverage, rtol=0, atol=1e-5)
    moved, extents = grid_geometry((28, 28)).centres + 0.01, torch.full((1, 784, 2), 1 / 28)
    zero = torch.zeros(1, 784)
    assert len(splat_weights(place_inside(moved, extents, zero, zero, (64, 64)), (28, 28)).patch) <= 4 * 784


def test_gradients_of_maps(listing):
    centres = torch.rand(2, 5, 2, dtype=torch.float64) - 0.5
    extents, angles = torch.rand(2, 5, 2, dtype=torch.float64) * 0.3 + 0.1, torch.rand(2, 5, dtype=torch.float64)
    tokens = torch.rand(2, 5, 3, dtype=torch.float64)
    free = [each.requires_grad_() for each in (centres, extents, angles, tokens)]

    def maps(centres, extents, angles, tokens):
        geometry = place_inside(centres, extents, angles, torch.zeros_like(angles), (64, 64))
        return dense_map(tokens, splat_weights(geometry, (4, 5)), (4, 5))

    assert torch.autograd.gradcheck(maps, free, eps=1e-7, atol=1e-4)


def test_a_small_patch_is_not_lost_in_a_large_one_around_it(listing):
    geometry = turned([[0.0, 0.0], [0.25, 0.25]], [[1.0, 1.0], [0.25, 0.25]])
    share = shares(geometry, (8, 8))[0, 1]
    torch.testing.assert_close(share[4:6, 4:6], torch.full((2, 2), 16 / 17))
    assert share.sum() == pytest.approx(4 * 16 / 17)


def picture_error(geometry, grid, density):
    """Of a map whose tokens are the mean colour of what patches see, against the photograph, where they see any."""
    picture = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[None].float() / 255
    steps = (2 * torch.arange(32) + 1) / 32 - 1
    points = geometry.points(torch.stack(torch.meshgrid(steps, steps, indexing='xy'), dim=-1).flatten(0, 1))
    tokens = F.grid_sample(picture, points, align_corners=False, padding_mode='border').mean(dim=-1).transpose(1, 2)
    if not density:  # as if all were of one size, and overlap alone counted
        pairs = overlaps(geometry, grid)
        total = torch.zeros(grid[0] * grid[1]).index_add(0, pairs.cell, pairs.share)
        laid = torch.zeros(grid[0] * grid[1], 3).index_add(0, pairs.cell, tokens[0][pairs.patch] * pairs.share[:, None])
        maps = (laid / total[:, None].clamp(min=1e-9)).T.reshape(1, 3, *grid)
    else:
        maps = dense_map(tokens, splat_weights(geometry, grid), grid)
    seen = splat_weights(geometry, grid).coverage[0] > 0.5
    return (maps - F.interpolate(picture, grid, mode='area'))[0][:, seen].square().mean().sqrt()


@pytest.mark.parametrize('motion', [(1.5, 2.5, 1.0), (1.0, 1.7, 1.0), (0.3, 1.2, 0.35)])
def test_maps_are_nearer_to_the_picture_than_plain_averages(motion):
    """Patches of a coarse grid, and finer ones that move and zoom over all of the image or close in on a part."""
    shift, zoom, focus = motion
    anchors = [Rows(n * n, n).anchors(CPU) for n in (6, 14)]
    moved = anchors[1].centres + shift * anchors[1].extents * (2 * torch.rand(196, 2) - 1)
    extents = anchors[1].extents * zoom ** (2 * torch.rand(196, 1) - 1)
    centres = torch.cat([anchors[0].centres, focus * moved])[None]
    extents = torch.cat([anchors[0].extents, focus * extents])[None]
    zero = torch.zeros(1, centres.shape[1])
    geometry = place_inside(centres, extents, zero, zero, (512, 512))
    sharp, plain = (picture_error(geometry, (28, 28), density) for density in (True, False))
    assert sharp < 0.98 * plain


def test_uncovered_cells_take_the_nearest_patch(listing):
    geometry = turned([[-0.8, -0.8], [0.8, 0.8]], [[0.1, 0.1]] * 2)
    share = shares(geometry, (8, 8))[0]
    assert share[:, 2, 2].tolist() == [1, 0]
    assert share[:, 5, 5].tolist() == [0, 1]


def test_coverage_says_what_no_patch_sees():
    geometry = turned([[-0.5, -0.5], [-0.5, -0.5], [0.75, 0.625]], [[0.5, 0.5], [0.5, 0.5], [0.25, 0.125]])
    coverage = splat_weights(geometry, (4, 4)).coverage[0]
    assert coverage[:2, :2].tolist() == [[1, 1], [1, 1]]
    assert coverage[3, 3] == 0.5
    assert coverage.sum() == pytest.approx(4.5)
    model = move_patches(timm.create_model('test_apvit', num_patches=4)).eval()
    image = torch.randn(2, 3, 160, 96)
    coverage = model.patch_coverage(image)
    assert coverage.shape == (2, 1, 10, 6)
    expected = splat_weights(model.patch_embed(image).geometry, (10, 6)).coverage
    torch.testing.assert_close(coverage[:, 0], expected)


def test_rotated_patches_land_where_their_outline_is(listing):
    geometry = turned([[0.0, 0.0]] * 2, [[0.6, 0.05], [1.0, 1.0]], [math.pi / 4, 0.0])
    share = shares(geometry, (9, 9))[0, 0]
    assert share.diagonal()[2:7].min() > 0.5  # clockwise on the screen: from the top left to the bottom right
    assert share.fliplr().diagonal()[[1, 2, 6, 7]].max() < 1e-3


@pytest.mark.parametrize('size', [(160, 160), (64, 96), (10, 200)])
@pytest.mark.parametrize('num', [None, 7, 49])
def test_model_maps_have_the_grid_of_the_image(size, num):
    model = move_patches(timm.create_model('test_apvit', num_patches=num)).eval()
    image = torch.randn(2, 3, *size)
    maps = model.forward_intermediates(image, indices=2, intermediates_only=True)
    expected = (2, 64, max(1, size[0] // 16), max(1, size[1] // 16))
    assert [tuple(m.shape) for m in maps] == [expected] * 2
    tokens = model.forward_intermediates(image, indices=2, intermediates_only=True, output_fmt='NLC')
    count = model.patch_geometry(image).centres.shape[1]
    assert [tuple(t.shape) for t in tokens] == [(2, count, 64)] * 2


def test_model_maps_are_the_vits_at_init():
    vit, model = vit_and_apvit('test_vit', 'test_apvit')
    image = torch.randn(2, 3, 160, 160)
    final, maps = model.forward_intermediates(image, norm=True)
    vit_final, vit_maps = vit.forward_intermediates(image, norm=True)
    torch.testing.assert_close(final, vit_final, rtol=0, atol=1e-3)
    for ours, theirs in zip(maps, vit_maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_forward_intermediates_has_every_option_of_timm():
    vit, model = vit_and_apvit('test_vit', 'test_apvit')
    image = torch.randn(1, 3, 160, 160)
    mask = torch.ones(101, 101, dtype=torch.bool).tril()
    for options in (
        {'output_dict': True, 'return_prefix_tokens': True},
        {'output_dict': True, 'intermediates_only': True},
        {'return_prefix_tokens': True, 'stop_early': True, 'indices': [1, 3]},
        {'attn_mask': mask, 'norm': True},
        {'is_causal': True},
    ):
        ours, theirs = (m.forward_intermediates(image, **options) for m in (model, vit))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    final, _ = model.forward_intermediates(image)
    torch.testing.assert_close(final, model.forward_features(image), rtol=0, atol=0)
    layers = model.get_intermediate_layers(image, n=2, reshape=True, return_prefix_tokens=True)
    assert [tuple(t.shape) for t in layers[0]] == [(1, 64, 10, 10), (1, 1, 64)]


class Maps(torch.nn.Module):
    """The last map of a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.forward_intermediates(x, indices=1, intermediates_only=True)[0]


def test_maps_compile_and_export_at_any_batch_size():
    maps = Maps(move_patches(timm.create_model('test_apvit', num_patches=9))).eval()
    x = torch.randn(2, 3, 96, 64)
    torch.testing.assert_close(torch.compile(maps, backend='eager', fullgraph=True)(x), maps(x), rtol=0, atol=1e-4)
    program = torch.export.export(maps, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    more = torch.randn(3, 3, 96, 64)
    torch.testing.assert_close(program.module()(more), maps(more), rtol=0, atol=1e-4)


def test_maps_of_no_image_and_on_the_meta_device():
    maps = Maps(timm.create_model('test_apvit', num_patches=9)).eval()
    assert maps(torch.randn(0, 3, 64, 64)).shape == (0, 64, 4, 4)
    assert maps.to('meta')(torch.randn(2, 3, 64, 64, device='meta')).shape == (2, 64, 4, 4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_maps_have_the_dtype_of_the_tokens(dtype, listing):
    tokens = torch.randn(2, 9, 4, dtype=dtype)
    maps = dense_map(tokens, splat_weights(random_geometry(), (5, 4)), (5, 4))
    assert maps.dtype == dtype
    with torch.autocast('cpu', torch.bfloat16):
        assert dense_map(tokens.float(), splat_weights(random_geometry(), (5, 4)), (5, 4)).dtype == torch.float32


def test_rejects_unknown_format_and_dropped_tokens():
    model = timm.create_model('test_apvit', patch_drop_rate=0.5)
    image = torch.randn(1, 3, 160, 160)
    with pytest.raises(ValueError, match="'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(image, output_fmt='NHWC')
    with pytest.raises(ValueError, match='tokens of all 100 patches for a map, got 50: set patch_drop_rate=0'):
        model.train().forward_intermediates(image)
    assert model.eval().forward_intermediates(image)[1][0].shape == (1, 64, 10, 10)


@pytest.mark.parametrize('num', [None, 16])
def test_features_only(num):
    backbone = timm.create_model('test_apvit', features_only=True, out_indices=(1, 3, 5), num_patches=num)
    assert backbone.feature_info.channels() == [64] * 3
    assert backbone.feature_info.reduction() == [16] * 3
    maps = backbone(torch.randn(2, 3, 96, 128))
    assert [tuple(m.shape) for m in maps] == [(2, 64, 6, 8)] * 3
    sum(m.sum() for m in maps).backward()

"""Dense maps: tokens put back where they looked."""

import pytest
import timm
import torch
from conftest import move_patches, vit_and_apvit

from timm_apvit.models.dense import dense_map, splat_weights
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
    expected = torch.nn.functional.avg_pool2d(tokens.transpose(1, 2).reshape(1, 3, 4, 4), 2)
    torch.testing.assert_close(down, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('grid', [(1, 1), (5, 9), (14, 14)])
def test_constant_tokens_give_a_constant_map_and_every_cell_a_value(grid):
    weights = splat_weights(random_geometry(), grid)
    assert weights.shape == (2, grid[0] * grid[1], 9)
    assert (weights >= 0).all()
    maps = dense_map(torch.full((2, 9, 3), 5.0), weights, grid)
    torch.testing.assert_close(maps, torch.full_like(maps, 5.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize(('rotation', 'tolerance'), [(0.0, 0.02), (1.0, 0.2)])
def test_weights_are_shares_of_overlap_against_painting(rotation, tolerance):
    """Paint patches on a fine raster: the mean coverage of a cell is its share (near it, where a patch is turned)."""
    geometry, grid, fine = random_geometry(1, 6, rotation), (3, 4), 100
    centres = Rows(grid[0] * fine * grid[1] * fine, grid[0] * fine).anchors(CPU).centres
    offset = centres[:, None] - geometry.centres[0]
    local = torch.linalg.solve(geometry.image_from_patch[0], offset[..., None])[..., 0]
    painted = (local.abs() <= 1).all(dim=-1).float().reshape(grid[0], fine, grid[1], fine, 6).mean(dim=(1, 3))
    painted = painted.reshape(-1, 6)
    covered = painted.sum(dim=-1) > 0.1
    expected = painted[covered] / painted[covered].sum(dim=-1, keepdim=True)
    assert covered.sum() >= 4
    share = splat_weights(geometry, grid)[0, covered]
    assert (share - expected).abs().sum(dim=-1).mean() <= tolerance


def test_uncovered_cells_take_the_nearest_patch():
    geometry = place_inside(
        torch.tensor([[[-0.8, -0.8], [0.8, 0.8]]]),
        torch.full((1, 2, 2), 0.1),
        torch.zeros(1, 2),
        torch.zeros(1, 2),
        (64, 64),
    )
    weights = splat_weights(geometry, (8, 8))[0].reshape(8, 8, 2)
    assert weights[2, 2].argmax() == 0
    assert weights[5, 5].argmax() == 1


def test_rotated_patches_land_where_their_outline_is():
    angle = torch.full((1, 1), torch.pi / 4)
    long = place_inside(torch.zeros(1, 1, 2), torch.tensor([[[0.6, 0.05]]]), angle, torch.zeros(1, 1), (64, 64))
    broad = place_inside(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), torch.zeros(1, 1), torch.zeros(1, 1), (64, 64))
    both = type(long)(*(torch.cat(pair, dim=1) for pair in zip(long[:5], broad[:5], strict=True)))
    share = splat_weights(both, (9, 9))[0, :, 0].reshape(9, 9)
    assert share.diagonal()[2:7].min() > 0.1  # clockwise on the screen: from the top left to the bottom right
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


def test_rejects_unknown_format_and_dropped_tokens():
    model = timm.create_model('test_apvit', patch_drop_rate=0.5)
    image = torch.randn(1, 3, 160, 160)
    with pytest.raises(ValueError, match="'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(image, output_fmt='NHWC')
    with pytest.raises(ValueError, match='patch_drop_rate=0 or eval mode'):
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

"""Position embeddings at free positions."""

import pytest
import torch
import torch.nn.functional as F

from timm_apvit import interpolate_pos_embed, resample_pos_embed
from timm_apvit.patching.anchors import Rows

CPU = torch.device('cpu')


@pytest.mark.parametrize('grid', [(14, 14), (10, 14), (3, 1), (1, 1)])
@pytest.mark.parametrize('prefix', [0, 1, 5])
def test_exact_at_cell_centres(grid, prefix):
    pos_embed = torch.randn(1, prefix + grid[0] * grid[1], 8)
    centres = Rows(grid[0] * grid[1], grid[0]).anchors(CPU).centres
    read = interpolate_pos_embed(pos_embed, centres.expand(3, -1, -1), grid, prefix)
    torch.testing.assert_close(read, pos_embed.expand(3, -1, -1), rtol=0, atol=1e-5)


def test_convention_is_bilinear_as_grid_sample_reads_over_pixel_edges():
    pos_embed, centres = torch.randn(1, 2 + 35, 8), torch.rand(2, 50, 2) * 2.4 - 1.2
    maps = pos_embed[:, 2:].reshape(1, 5, 7, 8).permute(0, 3, 1, 2).expand(2, -1, -1, -1)
    expected = F.grid_sample(maps, centres[:, None], padding_mode='border', align_corners=False)
    read = interpolate_pos_embed(pos_embed, centres, (5, 7), 2)
    torch.testing.assert_close(read[:, 2:], expected[:, :, 0].transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read[:, :2], pos_embed[:, :2].expand(2, -1, -1))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept_and_geometry_is_not_rounded(dtype):
    pos_embed, centres = torch.randn(1, 196, 8).to(dtype), torch.rand(1, 20, 2) * 2 - 1
    read = interpolate_pos_embed(pos_embed, centres, (14, 14))
    assert read.dtype == dtype
    expected = interpolate_pos_embed(pos_embed.float(), centres, (14, 14))
    torch.testing.assert_close(read.float(), expected, rtol=2**-8, atol=1e-6)


def test_gradcheck():
    pos_embed = torch.randn(1, 1 + 12, 2, dtype=torch.float64, requires_grad=True)
    # float32 inside: centres are held fixed here, and their gradient is checked against the slope between two cells.
    centres = torch.tensor([[[0.1, -0.3], [0.9, 0.9]]])
    assert torch.autograd.gradcheck(lambda p: interpolate_pos_embed(p, centres, (3, 4), 1), (pos_embed,))
    ramp = torch.arange(4.0).reshape(1, 4, 1)
    point = torch.tensor([[[0.1, 0.0]]], requires_grad=True)
    interpolate_pos_embed(ramp, point, (1, 4)).sum().backward()
    torch.testing.assert_close(point.grad, torch.tensor([[[2.0, 0.0]]]))  # 4 cells over a width of 2


def test_autocast_does_not_round():
    pos_embed, centres = torch.randn(1, 196, 8), torch.rand(1, 20, 2) * 2 - 1
    expected = interpolate_pos_embed(pos_embed, centres, (14, 14))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        read = interpolate_pos_embed(pos_embed, centres, (14, 14))
    torch.testing.assert_close(read, expected, rtol=0, atol=0)


def test_rejects_a_grid_that_does_not_fit():
    with pytest.raises(
        ValueError, match=r'shape \(1, 197, D\) for 1 prefix tokens and a 14 x 14 grid, got \[1, 196, 8\]'
    ):
        interpolate_pos_embed(torch.zeros(1, 196, 8), torch.zeros(1, 2, 2), (14, 14), 1)


def test_nan_positions_give_nan():
    read = interpolate_pos_embed(torch.ones(1, 12, 2), torch.tensor([[[float('nan'), 0.0], [0.0, 0.0]]]), (3, 4))
    assert read.isnan().tolist() == [[[True, True], [False, False]]]


@pytest.mark.parametrize(
    ('old', 'new'),
    [((14, 14), (7, 7)), ((4, 16), (8, 8)), ((8, 8), (4, 16)), ((16, 16), (20, 5))],
)
def test_resampling_keeps_smooth_functions_and_prefix_tokens(old, new):
    """Of an embedding that holds each cell's coordinates, every cell of the new grid gets its own."""
    own = Rows(old[0] * old[1], old[0]).anchors(CPU).centres
    expected = Rows(new[0] * new[1], new[0]).anchors(CPU).centres
    resampled = resample_pos_embed(torch.cat([torch.full((1, 1, 2), 9.0), own[None]], dim=1), old, new, 1)
    inner = (expected.abs() < 0.7).all(dim=-1)
    torch.testing.assert_close(resampled[0, 1:][inner], expected[inner], rtol=0, atol=0.05)
    assert resampled[0, 0].tolist() == [9.0, 9.0]


def test_resampling_is_timms():
    timm_layers = pytest.importorskip('timm.layers')
    pos_embed = torch.randn(1, 1 + 196, 8)
    expected = timm_layers.resample_abs_pos_embed(pos_embed, [9, 5], old_size=[14, 14])
    torch.testing.assert_close(resample_pos_embed(pos_embed, (14, 14), (9, 5), 1), expected, rtol=0, atol=1e-6)
    assert resample_pos_embed(pos_embed, (14, 14), (14, 14), 1) is pos_embed

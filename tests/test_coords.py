"""The frame: cell centres, layouts and anchors."""

import pytest
import torch
import torch.nn.functional as F

from timm_apvit.patching.anchors import Rows, check_num_patches, resolve_layout
from timm_apvit.patching.coords import sample_grid

CPU = torch.device('cpu')


def test_convention_sample_grid_is_that_of_affine_grid():
    """Centres are those of PyTorch's own grids over pixel edges, (x, y), rows of different length included."""
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, 1, 3, 5], align_corners=False)[0]
    torch.testing.assert_close(sample_grid((3, 5), CPU), grid)


def test_convention_grid_anchors_are_row_by_row_cell_centres():
    centres, extents, _ = Rows(15, 3).anchors(CPU)
    expected = F.affine_grid(torch.eye(2, 3)[None], [1, 1, 3, 5], align_corners=False)[0].reshape(-1, 2)
    torch.testing.assert_close(centres, expected)
    torch.testing.assert_close(extents, torch.tensor([1 / 5, 1 / 3]).expand(15, 2))


@pytest.mark.parametrize('num', [1, 2, 3, 7, 13, 49, 97, 98, 196, 401])
@pytest.mark.parametrize('base', [(14, 14), (10, 14), (1, 9)])
def test_anchors_tile_the_image(num, base):
    """Every point of the image lies in exactly one anchor."""
    centres, extents, _ = resolve_layout(num, base).anchors(CPU)
    assert centres.shape == extents.shape == (num, 2)
    points = torch.rand(5000, 1, 2) * 2 - 1
    inside = ((points - centres).abs() < extents).all(dim=-1).sum(dim=1)
    assert (inside == 1).float().mean() > 0.999  # but for points within rounding of an edge
    assert (4 * extents.prod(dim=-1)).sum() == pytest.approx(4, rel=1e-5)


def test_anchors_of_a_row_are_equal_and_rows_differ_by_one_at_most():
    num, rows = 97, 10
    centres = Rows(num, rows).anchors(CPU).centres
    counts = torch.unique(centres[:, 1], return_counts=True)[1]
    assert counts.tolist() == [(r + 1) * num // rows - r * num // rows for r in range(rows)]


def test_layout_of_the_base_count_is_the_base_grid():
    assert resolve_layout(18, (2, 9)).grids == (Rows(18, 2),)
    assert resolve_layout((3, 6), (2, 9)) == resolve_layout([3, 6], (2, 9))
    assert resolve_layout((3, 6), (2, 9)).grids == (Rows(18, 3),)
    assert resolve_layout(98, (14, 14)).grids == (Rows(98, 10),)
    assert [Rows(*rows).grid for rows in ((18, 3), (98, 10), (7, 3), (1, 1))] == [(3, 6), (10, 10), (3, 2), (1, 1)]
    assert resolve_layout(1, (14, 14)).grids == (Rows(1, 1),)
    assert resolve_layout(3, (100, 1)).grids == (Rows(3, 3),)


@pytest.mark.parametrize('bad', [0, -1, 2.0, '4', True, (0, 4), (4,), (4, 4, 4), (4, 1.5), None, [], (True, 2)])
def test_rejects_bad_num_patches(bad):
    with pytest.raises(ValueError, match='expected num_patches to be an integer >= 1 or'):
        check_num_patches(bad)


def test_accepts_integers_of_other_libraries():
    assert check_num_patches(torch.tensor(7)) == 7
    assert check_num_patches((torch.tensor(2), 3)) == (2, 3)

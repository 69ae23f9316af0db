"""Where patches lie: formula, Jacobians, containment and its gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from timm_apvit import TRANSFORMS
from timm_apvit.patching.anchors import Anchors, Rows
from timm_apvit.patching.coords import sample_grid
from timm_apvit.patching.geometry import footprint, inward_clamp, patch_jacobians, place_inside
from timm_apvit.patching.warps import Spline

CPU = torch.device('cpu')
SIZE = (60, 100)
WARPS = ('none', 'perspective', 'spline')


def placed(warp='none', batch=2, num=5, dtype=torch.float64, spread=0.3):
    """Random patches with a warp, well inside an image."""
    values = torch.rand(batch, num, 6, dtype=dtype)
    own = {}
    if warp == 'perspective':
        own['perspective'] = torch.rand(batch, num, 2, dtype=dtype) * 0.8 - 0.4
    if warp == 'spline':
        own['spline'] = Spline()(torch.randn(batch, num, 16, 2, dtype=dtype) * 0.2)
    return place_inside(
        (values[..., :2] - 0.5) * spread, 0.1 + values[..., 2:4] * 0.1, values[..., 4] * 6, values[..., 5], SIZE, **own
    )


def test_convention_points_are_those_of_affine_grid():
    """P = c + D^-1 R D diag(e) K u, as a matrix given to PyTorch's ``affine_grid``."""
    centre, extent, phi, shear = torch.tensor([0.1, -0.2]), torch.tensor([0.2, 0.25]), 0.4, 0.3
    geometry = place_inside(
        centre[None, None], extent[None, None], torch.full((1, 1), phi), torch.full((1, 1), shear), SIZE
    )
    pixels = torch.diag(torch.tensor([SIZE[1] / 2, SIZE[0] / 2]))
    rotation = torch.tensor([[math.cos(phi), -math.sin(phi)], [math.sin(phi), math.cos(phi)]])
    linear = pixels.inverse() @ rotation @ pixels @ torch.diag(extent) @ torch.tensor([[1, shear], [0, 1]])
    expected = F.affine_grid(torch.cat([linear, centre[:, None]], 1)[None], [1, 1, 5, 7], align_corners=False)
    torch.testing.assert_close(geometry.points(sample_grid((5, 7), CPU))[0], expected, rtol=0, atol=1e-6)


def test_convention_rotation_is_clockwise_on_the_screen_and_rigid_in_pixels():
    centres, extents = torch.zeros(1, 2), torch.tensor([[0.2, 0.1]])
    geometry = place_inside(
        centres[None], extents[None], torch.full((1, 1), math.pi / 2), torch.zeros(1, 1), image_size=(50, 100)
    )
    corners = geometry.outlines()[0, 0] * torch.tensor([50.0, 25.0])  # pixels about the centre
    # Half-extents of 10 x 2.5 pixels: the top-left corner (-10, -2.5) turns to (2.5, -10).
    torch.testing.assert_close(corners[0], torch.tensor([2.5, -10.0]), atol=1e-5, rtol=0)
    sides = (corners[1:] - corners[:-1]).norm(dim=-1)
    torch.testing.assert_close(sides, torch.tensor([20.0, 5.0, 20.0, 5.0]))


@pytest.mark.parametrize('warp', WARPS)
def test_convention_the_centre_is_where_a_patch_has_its_own(warp):
    geometry = placed(warp)
    torch.testing.assert_close(geometry.points(torch.zeros(2, dtype=torch.float64)), geometry.centres)


def test_outlines_are_closed_and_clockwise_from_the_top_left():
    centres, extents, _ = Rows(1, 1).anchors(CPU)
    geometry = TRANSFORMS['translation']()({'shift': torch.zeros(1, 1, 2)}, Anchors(centres, extents), SIZE)
    assert geometry.outlines()[0, 0].tolist() == [[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]
    fine = geometry.outlines(4)[0, 0]
    assert fine.shape == (17, 2)
    assert fine[2].tolist() == [0, -1]


@pytest.mark.parametrize('warp', WARPS)
def test_jacobians_are_those_of_autograd(warp):
    geometry, local = placed(warp), sample_grid((3, 4), CPU).double()
    local[0, 0] = -1 / 3  # a control point, where the kernel's logarithm has its pole
    expected = torch.autograd.functional.jacobian(lambda u: geometry.points(u).sum(dim=(0, 1)), local)
    expected = torch.einsum('ijkijl->ijkl', expected)
    jacobians = patch_jacobians(geometry, local).expand(2, 5, 3, 4, 2, 2)
    torch.testing.assert_close(jacobians.sum(dim=(0, 1)), expected, rtol=0, atol=1e-9)


def test_shape_jacobians_are_one_for_all_points_without_a_warp():
    local = sample_grid((3, 4), CPU).double()
    assert patch_jacobians(placed(), local).shape == (2, 5, 1, 1, 2, 2)
    assert patch_jacobians(placed('spline'), local).shape == (2, 5, 3, 4, 2, 2)


def test_footprint_is_the_larger_singular_value():
    matrices = torch.randn(2, 5, 2, 2) + 2 * torch.eye(2)
    matrices = matrices[..., [[0, 0], [1, 1]], [[0, 1], [0, 1]]]
    matrices = torch.where(torch.linalg.det(matrices)[..., None, None] > 0, matrices, torch.eye(2))
    jacobian = torch.diag(torch.tensor([100.0, 60.0])) @ matrices @ torch.diag(torch.tensor([1 / 4, 1 / 3]))
    expected = torch.linalg.svdvals(jacobian)[..., 0]
    torch.testing.assert_close(footprint(matrices, SIZE, (3, 4)), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize('warp', WARPS)
def test_footprint_is_the_way_in_pixels_from_sample_to_sample(warp):
    """Between the nearest and the farthest neighbour of a fine grid of samples."""
    geometry, size = placed(warp, dtype=torch.float32), (40, 50)
    local = sample_grid(size, CPU)
    points = geometry.points(local) * torch.tensor([SIZE[1] / 2, SIZE[0] / 2])
    steps = footprint(patch_jacobians(geometry, local), SIZE, size).expand(2, 5, *size)
    diagonal = math.sqrt(2) * steps
    for axis in (2, 3):
        ways = points.diff(dim=axis).norm(dim=-1)
        bound = steps[..., : ways.shape[2], : ways.shape[3]]
        assert (ways <= bound * 1.05 + 1e-4).all()
    both = (points[..., 1:, 1:, :] - points[..., :-1, :-1, :]).norm(dim=-1)
    other = (points[..., 1:, :-1, :] - points[..., :-1, 1:, :]).norm(dim=-1)
    assert (torch.maximum(both, other) >= 0.9 * diagonal[..., :-1, :-1] / math.sqrt(2)).all()


@pytest.mark.parametrize('warp', WARPS)
def test_what_is_too_wide_is_shrunk_and_what_is_out_is_shifted(warp):
    own = {}
    if warp == 'perspective':
        own['perspective'] = torch.tensor([[[0.5, -0.3]]])
    if warp == 'spline':
        own['spline'] = Spline()(torch.randn(1, 1, 16, 2) * 0.2)
    geometry = place_inside(
        torch.full((1, 1, 2), 0.9), torch.full((1, 1, 2), 1.5), torch.ones(1, 1), torch.zeros(1, 1), SIZE, **own
    )
    low, high = (f(geometry.outlines(40), dim=2)[0, 0] for f in (torch.amin, torch.amax))
    # It fills the image along one axis; of a spline a bound is known, which is near.
    tolerance = 0.05 if warp == 'spline' else 1e-6
    assert (high - low).max().item() == pytest.approx(2, abs=tolerance)
    assert low.min() >= -1 - 1e-6
    assert high.max() <= 1 + 1e-6
    assert high[0] == pytest.approx(1, abs=tolerance)


def test_rejects_two_warps():
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match='expected a perspective or a spline, got both'):
        place_inside(one[..., None], one[..., None], one, one, SIZE, torch.zeros(1, 1, 2), torch.zeros(1, 1, 19, 2))


@pytest.mark.parametrize(('grad', 'passed'), [(1.0, 1.0), (-1.0, 0.0)])
def test_inward_clamp_passes_the_gradients_that_lead_inside(grad, passed):
    x = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)  # inside, at the bound, beyond it
    inward_clamp(x, torch.full((3,), -1.0), torch.ones(3)).backward(torch.full((3,), grad))
    assert x.grad.tolist() == [grad, passed, passed]


def test_inward_clamp_supports_vmap():
    low, high = torch.full((3,), -1.0), torch.ones(3)
    x = torch.tensor([0.5, -3.0, 2.0])
    batched = torch.func.vmap(lambda t: inward_clamp(t, low, high))(x.expand(2, 3))
    assert batched.tolist() == [[0.5, -1.0, 1.0]] * 2

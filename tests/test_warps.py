"""Warps: oracles for both, and that a spline never folds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_apvit.patching.coords import sample_grid
from timm_apvit.patching.warps import (
    MAX_STRAIN,
    OUTLINE_MARGIN,
    OUTLINE_POINTS,
    STRAIN_GRID,
    STRAIN_MARGIN,
    STRAIN_OF_DISPLACEMENT,
    Spline,
    lattice,
    perspective_stretch,
    solve_spline,
    spline_basis,
    spline_gradients,
    spline_values,
    warp_jacobians,
    warped,
)

CPU = torch.device('cpu')
CONTROL = lattice(CPU, torch.float64)
LOCAL = sample_grid((5, 7), CPU).reshape(-1, 2)


def cardinal(points):
    """Displacement at points by a displacement of 1 of each control point: ``(P, 16)`` and gradients ``(P, 16, 2)``."""
    values, gradients = spline_basis(points)
    solution = torch.tensor(solve_spline(), dtype=torch.float64)
    return values @ solution, torch.einsum('pjl,ji->pil', gradients, solution)


def fine_grid(side):
    return lattice(CPU, torch.float64, side)


def homographies(perspective):
    """``u / (1 + v . u)`` as matrices: ``(B, N, 2)`` -> ``(B * N, 3, 3)``."""
    matrices = torch.eye(3).repeat(perspective.shape[0] * perspective.shape[1], 1, 1)
    matrices[:, 2, :2] = perspective.flatten(0, 1)
    return matrices


def test_projective_is_opencvs_and_kornias_homography():
    cv2, kornia = pytest.importorskip('cv2'), pytest.importorskip('kornia.geometry.linalg')
    perspective = torch.rand(2, 3, 2) - 0.5
    points = warped(perspective, None, LOCAL).flatten(0, 1)
    matrices = homographies(perspective)
    expected = kornia.transform_points(matrices, LOCAL.expand(6, -1, -1))
    torch.testing.assert_close(points, expected, rtol=0, atol=1e-5)
    for own, matrix in zip(points, matrices, strict=True):
        theirs = cv2.perspectiveTransform(LOCAL.numpy()[None], matrix.numpy().astype(np.float64))[0]
        torch.testing.assert_close(own, torch.from_numpy(theirs), rtol=0, atol=1e-5)


def test_projective_is_the_homography_of_its_corners():
    """The one that OpenCV finds from where the four corners go."""
    cv2 = pytest.importorskip('cv2')
    perspective, corners = torch.tensor([[[0.3, -0.4]]]), torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    moved = warped(perspective, None, corners)[0, 0]
    matrix = cv2.getPerspectiveTransform(corners.numpy(), moved.numpy())
    theirs = cv2.perspectiveTransform(LOCAL.numpy()[None], matrix)[0]
    torch.testing.assert_close(warped(perspective, None, LOCAL)[0, 0], torch.from_numpy(theirs), rtol=0, atol=1e-5)


def test_spline_is_scipys():
    scipy = pytest.importorskip('scipy.interpolate')
    displacements = torch.rand(2, 3, 16, 2) * 0.1 - 0.05
    spline = Spline()(displacements)
    at_control = spline_values(spline, CONTROL.float())
    # What it is given, less what moves the centre, and scaled down by one factor.
    factor = (at_control[..., 1:, :] - at_control[..., :1, :]) / (displacements[..., 1:, :] - displacements[..., :1, :])
    torch.testing.assert_close(factor, factor[..., :1, :1].expand_as(factor), rtol=1e-2, atol=0)
    assert 0.5 < factor.min() < factor.max() <= 1.001
    for given_values, points in zip(at_control.flatten(0, 1), spline_values(spline, LOCAL).flatten(0, 1), strict=True):
        theirs = scipy.RBFInterpolator(CONTROL.numpy(), given_values.numpy(), kernel='thin_plate_spline')(LOCAL.numpy())
        torch.testing.assert_close(points.double(), torch.from_numpy(theirs), rtol=0, atol=1e-5)


def test_spline_reproduces_affine_maps():
    matrix = torch.tensor([[0.1, -0.2], [0.05, 0.15]])
    spline = Spline()((CONTROL.float() @ matrix.T).expand(1, 1, 16, 2))
    gradients = spline_gradients(spline, LOCAL)
    factor = 1 / math.sqrt(1 + (matrix.norm().item() * STRAIN_MARGIN / MAX_STRAIN) ** 2)
    torch.testing.assert_close(gradients, (matrix * factor)[..., None].expand_as(gradients), rtol=0, atol=1e-5)


def test_warps_of_zero_are_the_identity_to_the_last_bit():
    assert torch.equal(warped(torch.zeros(1, 1, 2), None, LOCAL)[0, 0], LOCAL)
    assert torch.equal(warped(None, Spline()(torch.zeros(1, 1, 16, 2)), LOCAL)[0, 0], LOCAL)
    assert torch.equal(warped(None, None, LOCAL)[0, 0], LOCAL)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32), kind=st.sampled_from(['normal', 'signs', 'one', 'smooth']), size=st.floats(0.01, 100)
)
def test_spline_never_folds(seed, kind, size):
    """The strain stays below its limit everywhere, so that the Jacobian is positive: 10,000 splines."""
    generator = torch.Generator().manual_seed(seed)
    displacements = torch.randn(1, 340, 16, 2, generator=generator)
    if kind == 'signs':
        displacements = displacements.sign()
    if kind == 'one':
        displacements = displacements * (torch.rand(1, 340, 16, 1, generator=generator) < 0.1)
    if kind == 'smooth':
        displacements = CONTROL.float() @ displacements[..., :2, :]
    spline = Spline()(displacements * size)
    points = torch.rand(60, 2, generator=generator) * 2 - 1
    jacobians = warp_jacobians(None, spline, points).movedim(-1, 2)
    strain = torch.linalg.matrix_norm(jacobians - torch.eye(2), ord=2)
    assert strain.max() < MAX_STRAIN
    assert torch.linalg.det(jacobians).min() > (1 - MAX_STRAIN) ** 2 - 1e-5


def test_no_displacements_strain_more_between_the_points_that_are_looked_at():
    """The displacements with the most strain at a point, for at most 1 at the grid, by linear programming."""
    linprog = pytest.importorskip('scipy.optimize').linprog
    _, at_grid = cardinal(fine_grid(STRAIN_GRID))
    step = 1 / (STRAIN_GRID - 1)
    # The middles of cells at a corner, along a side and inside, and of sides of cells.
    points = torch.tensor([[1 - step, 1.0], [1 - step, 1 - step], [0.0 + step, 1.0], [1 - step, step]]).double()
    _, at_points = cardinal(points)
    for direction in torch.tensor([[1.0, 0], [0, 1], [0.7071, 0.7071]]).double():
        limits = (at_grid @ direction).numpy()
        for aim in (at_points @ direction).numpy():
            found = linprog(-aim, np.concatenate([limits, -limits]), np.ones(2 * len(limits)), bounds=(None, None))
            assert found.status == 0
            assert 1 <= -found.fun < STRAIN_MARGIN


def test_constants_bound_what_they_say():
    _, gradients = cardinal(fine_grid(41))
    directions = torch.stack([torch.linspace(0, math.pi, 19).cos(), torch.linspace(0, math.pi, 19).sin()]).double()
    strain = math.sqrt(2) * (gradients @ directions).abs().sum(dim=1).max().item()
    assert 0.9 * STRAIN_OF_DISPLACEMENT < strain <= STRAIN_OF_DISPLACEMENT

    along = torch.linspace(-1, 1, 20 * OUTLINE_POINTS + 1, dtype=torch.float64)
    values, _ = cardinal(torch.stack([along, torch.ones_like(along)], dim=1))
    ends = values[::20]
    share = torch.arange(20)[:, None, None] / 20
    chords = (ends[:-1] * (1 - share) + ends[1:] * share).transpose(0, 1).flatten(0, 1)
    beyond = (values[:-1] - chords).abs().sum(dim=1).max().item()
    assert 0.9 * OUTLINE_MARGIN < beyond <= OUTLINE_MARGIN


@pytest.mark.parametrize('patch_aspect', [1.0, 0.5, 3.0])
def test_perspective_stretch_is_the_largest_norm_of_the_jacobian(patch_aspect):
    angles = torch.rand(4000, dtype=torch.float64) * 2 - 1
    v = 0.4 * torch.stack([angles, (1 - angles.abs()) * torch.randn(4000).sign()], dim=-1)
    v[:4] = 0.4 * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]).double()
    scale = torch.tensor([patch_aspect, 1.0]).double()
    jacobians = warp_jacobians(v[None], None, corners).movedim(-1, 2) * scale[:, None] / scale
    largest = torch.linalg.matrix_norm(jacobians, ord=2).max().item()
    assert largest == pytest.approx(perspective_stretch(0.4, patch_aspect), rel=1e-6)


def test_dtype_autocast_does_not_round_a_spline():
    displacements = torch.randn(1, 3, 16, 2) * 0.2
    exact = warped(None, Spline()(displacements), LOCAL)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(warped(None, Spline()(displacements), LOCAL), exact, rtol=0, atol=2e-6)
    assert list(Spline().state_dict()) == []


def test_gradcheck_spline():
    local = torch.rand(4, 2, dtype=torch.float64) * 2 - 1
    displacements = torch.randn(1, 2, 16, 2, dtype=torch.float64) * 0.2

    def outputs(values):
        spline = Spline()(values)
        return warped(None, spline, local), warp_jacobians(None, spline, local)

    assert torch.autograd.gradcheck(outputs, displacements.requires_grad_())

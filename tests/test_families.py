"""The transform families: formula, nesting, bounds, containment and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from timm_apvit import TRANSFORMS
from timm_apvit.patching.anchors import Anchors, Layout, Rows
from timm_apvit.patching.coords import sample_grid
from timm_apvit.patching.geometry import footprint, patch_jacobians
from timm_apvit.patching.warps import MAX_STRAIN, lattice

CPU = torch.device('cpu')
SIZE = (60, 100)
FAMILIES = list(TRANSFORMS)
FIELDS = {field: width for family in TRANSFORMS.values() for field, width in family.fields.items()}
NESTED = [
    ('translation', 'scale'),
    ('scale', 'anisotropic_scale'),
    ('scale', 'similarity'),
    ('similarity', 'affine'),
    ('anisotropic_scale', 'affine'),
    ('affine', 'projective'),
    ('similarity', 'tps'),
]


def random_parameters(fields, batch=2, num=12, std=1.0, dtype=torch.float32) -> dict[str, Tensor]:
    return {name: torch.randn(batch, num, width, dtype=dtype) * std for name, width in fields.items()}


def laid(num, rows):
    """A layout of N anchors in rows."""
    layout = Layout()
    layout.grids = (Rows(num, rows),)
    return layout


def zeros(num: int, fields=FIELDS) -> dict[str, Tensor]:
    return {name: torch.zeros(1, num, width) for name, width in fields.items()}


@pytest.mark.parametrize('name', FAMILIES)
def test_zero_is_the_identity(name):
    centres, extents, _ = Rows(12, 3).anchors(CPU)
    geometry = TRANSFORMS[name]()(zeros(12), Anchors(centres, extents), SIZE)
    torch.testing.assert_close(geometry.centres[0], centres)
    torch.testing.assert_close(geometry.extents[0], extents)
    expected = F.affine_grid(torch.eye(2, 3)[None], [1, 1, 3 * 4, 4 * 4], align_corners=False)[0]
    points = geometry.points(sample_grid((4, 4), CPU))[0].reshape(3, 4, 4, 4, 2).transpose(1, 2)
    torch.testing.assert_close(points.reshape(12, 16, 2), expected)


@pytest.mark.parametrize('name', FAMILIES)
def test_convention_formula_against_affine_grid(name):
    """P = c + D^-1 R D diag(e S) K V(u): bounded parameters, as a matrix given to PyTorch's ``affine_grid``."""
    fields = TRANSFORMS[name].fields
    transform = TRANSFORMS[name](max_rotation=30, max_shear=0.4, max_shift=0.2, max_zoom=1.3, max_warp=0.1)
    centres, extents = torch.tensor([[0.1, -0.2]]), torch.tensor([[0.2, 0.25]])
    raw = random_parameters(FIELDS, 1, 1)
    geometry = transform(raw, Anchors(centres, extents), SIZE)
    raw = {field: raw[field] * (field in fields) for field in FIELDS}
    phi = math.radians(30) * raw['rotation'][0, 0, 0].tanh()
    shear = 0.4 * raw['shear'][0, 0, 0].tanh()
    zoom = 1.3 ** torch.tanh(raw['scale'] + torch.tensor([1, -1]) * raw['aspect'])[0, 0]
    pixels = torch.diag(torch.tensor([SIZE[1] / 2, SIZE[0] / 2]))
    rotation = torch.tensor([[phi.cos(), -phi.sin()], [phi.sin(), phi.cos()]])
    shearing = torch.tensor([[1, shear], [0, 1]])
    linear = pixels.inverse() @ rotation @ pixels @ torch.diag(extents[0] * zoom) @ shearing
    centre = centres[0] + 0.2 * 2 * extents[0] * raw['shift'][0, 0].tanh()
    expected = F.affine_grid(torch.cat([linear, centre[:, None]], 1)[None], [1, 1, 5, 7], align_corners=False)
    unwarped = geometry._replace(perspective=None, spline=None)
    torch.testing.assert_close(unwarped.points(sample_grid((5, 7), CPU))[0], expected)
    torch.testing.assert_close(geometry.rotation[0, 0], phi)
    assert (geometry.perspective is not None, geometry.spline is not None) == (name == 'projective', name == 'tps')


def test_convention_perspective():
    """The first parameter makes the patch denser at its right, the second at its bottom; each alone up to the bound."""
    centres, extents, _ = Rows(1, 1).anchors(CPU)
    for axis, sign in ((0, 1), (0, -1), (1, 1), (1, -1)):
        raw = zeros(1)
        raw['perspective'][..., axis] = 50.0 * sign
        geometry = TRANSFORMS['projective'](max_perspective=0.4)(raw, Anchors(centres, 0.1 * extents), (50, 50))
        expected = torch.zeros(2)
        expected[axis] = 0.4 * sign
        torch.testing.assert_close(geometry.perspective[0, 0], expected)
        steps = footprint(patch_jacobians(geometry, sample_grid((8, 8), CPU)), (50, 50), (8, 8))[0, 0]
        dense, thin = (steps.select(1 - axis, 7), steps.select(1 - axis, 0))[::sign]
        assert (dense < thin).all()


def test_convention_control_points_come_row_by_row():
    """Raw displacement of one control point, against where that point of the patch goes."""
    centres, extents = torch.zeros(1, 2), torch.full((1, 2), 0.2)
    raw = zeros(1)
    raw['warp'][0, 0, 2 * (1 * 4 + 3)] = 0.1  # x of the second row's last: u = (1, -1/3)
    geometry = TRANSFORMS['tps'](max_warp=0.5)(raw, Anchors(centres, extents), (50, 50))
    still = torch.tensor([[-1.0, -1], [-1, 1], [0, 0], [1, -1], [1, 1], [1 / 3, -1 / 3]])
    moved = geometry.points(torch.cat([torch.tensor([[1.0, -1 / 3]]), still]))[0, 0] / 0.2
    assert moved[0, 0] - 1 == pytest.approx(0.5 * math.tanh(0.1), rel=0.05)
    assert moved[0, 1] == pytest.approx(-1 / 3, abs=1e-5)
    torch.testing.assert_close(moved[1:], still, rtol=0, atol=0.005)


@pytest.mark.parametrize(('inner', 'outer'), NESTED)
def test_families_nest_by_field_name(inner, outer):
    assert set(TRANSFORMS[inner].fields) < set(TRANSFORMS[outer].fields)
    centres, extents, _ = Rows(12, 3).anchors(CPU)
    raw = zeros(12) | random_parameters(TRANSFORMS[inner].fields, 1)
    local = sample_grid((3, 3), CPU)
    points = [TRANSFORMS[name]()(raw, Anchors(centres, extents), SIZE).points(local) for name in (inner, outer)]
    torch.testing.assert_close(*points, rtol=0, atol=0)


@pytest.mark.parametrize('name', FAMILIES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    layout=st.sampled_from([(1, 1), (12, 3), (7, 3), (196, 14), (50, 50)]),
    std=st.sampled_from([0.1, 1.0, 3.0, 100.0]),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    patch=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    bounds=st.fixed_dictionaries(
        {
            'max_shift': st.floats(0, 9), 'max_zoom': st.floats(1, 9), 'max_rotation': st.floats(0, 180),
            'max_shear': st.floats(0, 3), 'max_perspective': st.floats(0, 0.9), 'max_warp': st.floats(0, 3),
        }
    ),
)  # fmt: skip
def test_every_sample_lies_inside_the_image_and_no_patch_folds(name, seed, layout, std, size, patch, bounds):
    """10,000 sets of parameters for each family: 25 batches of 400 patches or more."""
    torch.manual_seed(seed)
    centres, extents, _ = Rows(*layout).anchors(CPU)
    raw = random_parameters(TRANSFORMS[name].fields, -(-400 // layout[0]), layout[0], std)
    transform = TRANSFORMS[name](**bounds)
    geometry = transform(raw, Anchors(centres, extents), size, noise=torch.randn_like(raw['shift']))
    assert geometry.points(sample_grid(patch, CPU)).abs().max() <= 1 + 1e-6
    assert geometry.outlines(30).abs().max() <= 1 + 1e-5
    assert all(value.isfinite().all() for value in geometry if value is not None)
    jacobians = patch_jacobians(geometry, sample_grid(patch, CPU))
    assert (torch.linalg.det(jacobians.double()) > 0).all()
    largest = footprint(jacobians, size, patch).max().item()
    assert largest <= transform.max_footprint(laid(*layout), size, patch) * 1.0001


@pytest.mark.parametrize('name', FAMILIES)
def test_bounds_hold(name):
    fields = TRANSFORMS[name].fields
    transform = TRANSFORMS[name](max_shift=0.5, max_zoom=3.0, max_rotation=20.0, max_shear=0.25, max_perspective=0.4)
    centres, extents, _ = Rows(400, 20).anchors(CPU)
    geometry = transform(random_parameters(fields, 4, 400, 5.0), Anchors(centres, extents), SIZE)
    zoom = geometry.extents / extents
    assert zoom.max() <= 3.001
    assert geometry.rotation.abs().max() <= math.radians(20.001)
    assert geometry.shear.abs().max() <= 0.2501
    inner = (centres.abs() < 0.6).all(dim=-1)  # nothing there is pushed by the border
    moved = ((geometry.centres - centres) / (2 * extents))[:, inner].abs()
    assert 0.45 < moved.max() <= 0.5001
    assert (zoom.max() > 2.9) == ('scale' in fields)
    assert (geometry.rotation.abs().max() > 0.3) == ('rotation' in fields)
    if geometry.perspective is not None:
        denominators = geometry.perspective.abs().sum(dim=-1)
        assert 0.39 < denominators.max() <= 0.4001


@pytest.mark.parametrize(
    ('name', 'tightness'), [*[(name, 0.9) for name in FAMILIES[:5]], ('projective', 0.7), ('tps', 0.6)]
)
def test_max_footprint_is_a_tight_bound(name, tightness):
    transform = TRANSFORMS[name](max_shift=0.5, max_zoom=3.0, max_rotation=20.0, max_shear=0.25)
    for layout in ((400, 20), (97, 10)):
        centres, extents, _ = Rows(*layout).anchors(CPU)
        raw = random_parameters(TRANSFORMS[name].fields, 20, layout[0], 20.0)
        geometry = transform(raw, Anchors(centres, extents), SIZE)
        everywhere = patch_jacobians(geometry, lattice(CPU, torch.float32, 9))
        largest = footprint(everywhere, SIZE, (3, 4)).max().item()
        bound = transform.max_footprint(laid(*layout), SIZE, (3, 4))
        assert tightness * bound < largest <= bound * 1.0001


def test_max_footprint_of_patches_that_may_not_warp_is_that_of_the_smaller_family():
    for name, inner in (('projective', 'affine'), ('tps', 'similarity')):
        still, smaller = (TRANSFORMS[each](max_perspective=0, max_warp=0) for each in (name, inner))
        assert still.max_footprint(laid(9, 3), SIZE, (4, 4)) == pytest.approx(
            smaller.max_footprint(laid(9, 3), SIZE, (4, 4))
        )


@pytest.mark.parametrize('name', FAMILIES)
def test_gradcheck_geometry(name):
    transform = TRANSFORMS[name](max_shift=0.3, max_zoom=1.2, max_rotation=10.0, max_shear=0.1)
    centres, extents = torch.tensor([[0.1, -0.2], [-0.3, 0.2]]).double(), torch.full((2, 2), 0.2).double()
    fields = TRANSFORMS[name].fields
    raw = random_parameters(fields, 1, 2, dtype=torch.float64)
    local = torch.rand(3, 2, dtype=torch.float64)

    def points(*values):
        geometry = transform(dict(zip(fields, values, strict=True)), Anchors(centres, extents), SIZE)
        return geometry.points(local), footprint(patch_jacobians(geometry, local), SIZE, (4, 4))

    assert torch.autograd.gradcheck(points, [raw[name].requires_grad_() for name in fields])


@pytest.mark.parametrize('name', FAMILIES)
def test_gradients_at_the_identity_are_finite_and_reach_every_field(name):
    centres, extents, _ = Rows(9, 3).anchors(CPU)
    raw = {field: value.requires_grad_() for field, value in zeros(9, TRANSFORMS[name].fields).items()}
    geometry = TRANSFORMS[name]()(raw, Anchors(centres, extents), SIZE)
    local = sample_grid((4, 4), CPU)
    steps = footprint(patch_jacobians(geometry, local), SIZE, (4, 4))
    (geometry.points(local) * torch.randn(4, 4, 2)).sum().add(steps.sum()).backward()
    for value in raw.values():
        assert value.grad.isfinite().all()
        assert value.grad[0, 4].abs().min() > 0  # the inner patch is free


@pytest.mark.parametrize('name', ['scale', 'projective', 'tps'])
@pytest.mark.parametrize('corner', [0, -1])
def test_border_patch_moves_inwards(name, corner):
    """Gradient descent moves a border patch, which starts pinned, to a target inside."""
    transform = TRANSFORMS[name](max_shift=2.0)
    centres, extents, _ = Rows(16, 4).anchors(CPU)
    raw = {name: value.requires_grad_() for name, value in zeros(16, TRANSFORMS[name].fields).items()}
    optimiser = torch.optim.SGD(raw.values(), lr=0.5)
    for _ in range(60):
        geometry = transform(raw, Anchors(centres, extents), SIZE)
        loss = geometry.centres[0, corner].square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert geometry.centres[0, corner].abs().max() < 0.4 < centres[corner].abs().min()


def test_lone_patch_zooms_in_and_then_moves():
    """N = 1 fills the image: it is free to move only once it is smaller, and gradients make it so."""
    transform = TRANSFORMS['scale'](max_shift=1.0, max_zoom=4.0)
    centres, extents, _ = Rows(1, 1).anchors(CPU)
    raw = {name: value.requires_grad_() for name, value in zeros(1, TRANSFORMS['scale'].fields).items()}
    optimiser = torch.optim.SGD(raw.values(), lr=0.3)
    for _ in range(100):
        geometry = transform(raw, Anchors(centres, extents), SIZE)
        loss = (geometry.outlines() - torch.tensor([0.4, 0.4])).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert geometry.extents.max() < 0.5
    assert (geometry.centres - 0.4).abs().max() < 0.1


def test_max_warp_below_the_largest_strain_lowers_the_bound_on_footprints():
    assert TRANSFORMS['tps'](max_warp=0.05).warp_stretch(1.0) < TRANSFORMS['tps']().warp_stretch(1.0) == 1 + MAX_STRAIN

"""Transform families: formula, nesting, bounds, containment and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_apvit.coords import anchors, sample_grid
from timm_apvit.transforms import (
    FIELDS,
    TRANSFORMS,
    PatchTransform,
    footprint,
    inward_clamp,
    patch_points,
    place_inside,
)

CPU = torch.device('cpu')
SIZE = (60, 100)


def random_parameters(fields, batch=2, num=12, std=1.0, dtype=torch.float32) -> dict[str, Tensor]:
    return {name: torch.randn(batch, num, FIELDS[name], dtype=dtype) * std for name in fields}


def zeros(num: int, fields=FIELDS) -> dict[str, Tensor]:
    return {name: torch.zeros(1, num, FIELDS[name]) for name in fields}


@pytest.mark.parametrize('name', TRANSFORMS)
def test_zero_is_the_identity(name):
    centres, extents = anchors((12, 3), CPU)
    geometry = PatchTransform(name)(zeros(12), centres, extents, SIZE)
    torch.testing.assert_close(geometry.centres[0], centres)
    torch.testing.assert_close(geometry.extents[0], extents)
    expected = F.affine_grid(torch.eye(2, 3)[None], [1, 1, 3 * 4, 4 * 4], align_corners=False)[0]
    points = patch_points(geometry, sample_grid((4, 4), CPU))[0].reshape(3, 4, 4, 4, 2).transpose(1, 2)
    torch.testing.assert_close(points.reshape(12, 16, 2), expected)


def test_convention_affine_formula_against_affine_grid():
    """P = c + D^-1 R D diag(e S) K u, as a matrix given to PyTorch's ``affine_grid``."""
    transform = PatchTransform('affine', max_rotation=30, max_shear=0.4, max_shift=0.2, max_zoom=1.3)
    centres, extents = torch.tensor([[0.1, -0.2]]), torch.tensor([[0.2, 0.25]])
    raw = random_parameters(TRANSFORMS['affine'], 1, 1)
    geometry = transform(raw, centres, extents, SIZE)
    phi = math.radians(30) * raw['rotation'][0, 0, 0].tanh()
    shear = 0.4 * raw['shear'][0, 0, 0].tanh()
    zoom = 1.3 ** torch.tanh(raw['scale'] + torch.tensor([1, -1]) * raw['aspect'])[0, 0]
    pixels = torch.diag(torch.tensor([SIZE[1] / 2, SIZE[0] / 2]))
    rotation = torch.tensor([[phi.cos(), -phi.sin()], [phi.sin(), phi.cos()]])
    shearing = torch.tensor([[1, shear], [0, 1]])
    linear = pixels.inverse() @ rotation @ pixels @ torch.diag(extents[0] * zoom) @ shearing
    centre = centres[0] + 0.2 * 2 * extents[0] * raw['shift'][0, 0].tanh()
    expected = F.affine_grid(torch.cat([linear, centre[:, None]], 1)[None], [1, 1, 5, 7], align_corners=False)
    torch.testing.assert_close(patch_points(geometry, sample_grid((5, 7), CPU))[0], expected)
    torch.testing.assert_close(geometry.rotation[0, 0], phi)


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


@pytest.mark.parametrize(
    ('inner', 'outer'),
    [
        ('translation', 'scale'),
        ('scale', 'anisotropic_scale'),
        ('scale', 'similarity'),
        ('similarity', 'affine'),
        ('anisotropic_scale', 'affine'),
    ],
)
def test_families_nest_by_field_name(inner, outer):
    assert set(TRANSFORMS[inner]) < set(TRANSFORMS[outer])
    centres, extents = anchors((12, 3), CPU)
    raw = {name: torch.zeros(2, 12, FIELDS[name]) for name in FIELDS}
    raw.update(random_parameters(TRANSFORMS[inner]))
    local = sample_grid((3, 3), CPU)
    points = [patch_points(PatchTransform(name)(raw, centres, extents, SIZE), local) for name in (inner, outer)]
    torch.testing.assert_close(*points, rtol=0, atol=0)


@pytest.mark.parametrize('name', TRANSFORMS)
@pytest.mark.parametrize('layout', [(1, 1), (12, 3), (7, 3), (196, 14)])
@pytest.mark.parametrize('std', [0.3, 3.0, 100.0])
def test_every_sample_lies_inside_the_image(name, layout, std):
    transform = PatchTransform(name, max_shift=5.0, max_zoom=8.0, max_rotation=180.0, max_shear=2.0)
    centres, extents = anchors(layout, CPU)
    raw = random_parameters(TRANSFORMS[name], 20, layout[0], std)
    geometry = transform(raw, centres, extents, SIZE, noise=torch.randn(20, layout[0], 2))
    corners = geometry.outlines()
    assert corners.abs().max() <= 1 + 1e-6
    determinant = torch.linalg.det(geometry.image_from_patch)
    assert (determinant > 0).all()
    assert all(value.isfinite().all() for value in geometry if value is not None)


@pytest.mark.parametrize('name', TRANSFORMS)
def test_bounds_hold(name):
    transform = PatchTransform(name, max_shift=0.5, max_zoom=3.0, max_rotation=20.0, max_shear=0.25)
    centres, extents = anchors((400, 20), CPU)
    geometry = transform(random_parameters(TRANSFORMS[name], 4, 400, 5.0), centres, extents, SIZE)
    zoom = geometry.extents / extents
    assert zoom.max() <= 3.001
    assert geometry.rotation.abs().max() <= math.radians(20.001)
    assert geometry.shear.abs().max() <= 0.2501
    inner = (centres.abs() < 0.7).all(dim=-1)  # nothing there is pushed by the border
    moved = ((geometry.centres - centres) / (2 * extents))[:, inner].abs()
    assert 0.45 < moved.max() <= 0.5001
    assert (zoom.max() > 2.9) == ('scale' in TRANSFORMS[name])
    assert (geometry.rotation.abs().max() > 0.3) == ('rotation' in TRANSFORMS[name])


@pytest.mark.parametrize('name', TRANSFORMS)
def test_max_footprint_bounds_the_footprint_tightly(name):
    transform = PatchTransform(name, max_shift=0.5, max_zoom=3.0, max_rotation=20.0, max_shear=0.25)
    for layout in ((400, 20), (97, 10)):
        centres, extents = anchors(layout, CPU)
        raw = random_parameters(TRANSFORMS[name], 20, layout[0], 20.0)
        geometry = transform(raw, centres, extents, SIZE)
        largest = footprint(geometry.image_from_patch, SIZE, (3, 4)).max().item()
        bound = transform.max_footprint(layout, SIZE, (3, 4))
        assert 0.9 * bound < largest <= bound * 1.0001


def test_footprint_is_the_larger_singular_value():
    matrices = torch.randn(2, 5, 2, 2) + 2 * torch.eye(2)
    matrices = matrices[..., [[0, 0], [1, 1]], [[0, 1], [0, 1]]]
    matrices = torch.where(torch.linalg.det(matrices)[..., None, None] > 0, matrices, torch.eye(2))
    jacobian = torch.diag(torch.tensor([100.0, 60.0])) @ matrices @ torch.diag(torch.tensor([1 / 4, 1 / 3]))
    expected = torch.linalg.svdvals(jacobian)[..., 0]
    torch.testing.assert_close(footprint(matrices, SIZE, (3, 4)), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize('name', TRANSFORMS)
def test_gradcheck_geometry(name):
    transform = PatchTransform(name, max_shift=0.3, max_zoom=1.2, max_rotation=10.0, max_shear=0.1)
    centres, extents = torch.tensor([[0.1, -0.2], [-0.3, 0.2]]).double(), torch.full((2, 2), 0.2).double()
    fields = TRANSFORMS[name]
    raw = random_parameters(fields, 1, 2, dtype=torch.float64)
    local = torch.rand(3, 2, dtype=torch.float64)

    def points(*values):
        geometry = transform(dict(zip(fields, values, strict=True)), centres, extents, SIZE)
        return patch_points(geometry, local), footprint(geometry.image_from_patch, SIZE, (4, 4))

    assert torch.autograd.gradcheck(points, [raw[name].requires_grad_() for name in fields])


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


@pytest.mark.parametrize('corner', [0, -1])
def test_border_patch_moves_inwards(corner):
    """Gradient descent moves a border patch, which starts pinned, to a target inside."""
    transform = PatchTransform('scale', max_shift=2.0)
    centres, extents = anchors((16, 4), CPU)
    raw = {name: value.requires_grad_() for name, value in zeros(16, TRANSFORMS['scale']).items()}
    optimiser = torch.optim.SGD(raw.values(), lr=0.5)
    for _ in range(60):
        geometry = transform(raw, centres, extents, SIZE)
        loss = geometry.centres[0, corner].square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert geometry.centres[0, corner].abs().max() < 0.4 < centres[corner].abs().min()


def test_lone_patch_zooms_in_and_then_moves():
    """N = 1 fills the image: it is free to move only once it is smaller, and gradients make it so."""
    transform = PatchTransform('scale', max_shift=1.0, max_zoom=4.0)
    centres, extents = anchors((1, 1), CPU)
    raw = {name: value.requires_grad_() for name, value in zeros(1, TRANSFORMS['scale']).items()}
    optimiser = torch.optim.SGD(raw.values(), lr=0.3)
    for _ in range(100):
        geometry = transform(raw, centres, extents, SIZE)
        loss = (geometry.outlines() - torch.tensor([0.4, 0.4])).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert geometry.extents.max() < 0.5
    assert (geometry.centres - 0.4).abs().max() < 0.1


def test_rejects_unknown_transform_and_bounds_out_of_range():
    with pytest.raises(ValueError, match=r"one of translation, scale, .*got 'rotation'"):
        PatchTransform('rotation')
    for bound, bad in [
        ('max_shift', -0.1), ('max_zoom', 0.5), ('max_rotation', 181), ('max_shear', -1), ('max_shift', math.inf),
        ('max_zoom', math.nan), ('max_zoom', '2'), ('max_rotation', True), ('max_shift', [1]),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f'expected {bound} to be a finite number within'):
            PatchTransform('affine', **{bound: bad})


def test_outlines_are_closed_and_clockwise_from_the_top_left():
    centres, extents = anchors((1, 1), CPU)
    geometry = PatchTransform('translation')(zeros(1), centres, extents, SIZE)
    assert geometry.outlines()[0, 0].tolist() == [[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]
    fine = geometry.outlines(4)[0, 0]
    assert fine.shape == (17, 2)
    assert fine[2].tolist() == [0, -1]

"""Sampling: oracles for bilinear reading, area averages and the pyramid."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_apvit import TRANSFORMS
from timm_apvit.patching.anchors import Anchors, Rows
from timm_apvit.patching.coords import sample_grid
from timm_apvit.patching.geometry import footprint, patch_jacobians, place_inside
from timm_apvit.patching.sampling import mip_level, mip_pyramid, num_mip_levels
from timm_apvit.patching.sampling import sample_patches as sample_pyramid

CPU = torch.device('cpu')


def sample_patches(image: Tensor, points: Tensor, footprint: Tensor, max_footprint: float) -> Tensor:
    """Sample patches of footprints up to a bound: ``(B, C, H, W)``, ``(B, N, P, P, 2)`` -> ``(B, N, C, P, P)``."""
    size = (image.shape[-2], image.shape[-1])
    return sample_pyramid(mip_pyramid(image, num_mip_levels(max_footprint, size)), points, footprint)


def grid_patches(image: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Identity patches of a grid of anchors: ``(B, N, C, P, P)``."""
    size = (image.shape[-2], image.shape[-1])
    transform = TRANSFORMS['translation']()
    centres, extents, _ = Rows(grid[0] * grid[1], grid[0]).anchors(CPU)
    raw = {'shift': torch.zeros(image.shape[0], grid[0] * grid[1], 2)}
    geometry = transform(raw, Anchors(centres, extents), size)
    points = geometry.points(sample_grid((patch, patch), CPU))
    steps = footprint(geometry.image_from_patch, size, (patch, patch))
    return sample_patches(image, points, steps, steps.max().item())


def fixed_patches(image: Tensor, patch: int) -> Tensor:
    """Patches of the fixed grid, row by row: ``(B, N, C, P, P)``."""
    return image.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


@pytest.mark.parametrize('size', [(64, 64), (48, 80), (16, 160)])
def test_identity_patches_are_the_fixed_grid(size):
    image = torch.randn(2, 3, *size)
    patches = grid_patches(image, (size[0] // 16, size[1] // 16), 16)
    torch.testing.assert_close(patches, fixed_patches(image, 16), rtol=0, atol=5e-5)


@pytest.mark.parametrize('factor', [2, 4, 8])
def test_aligned_power_of_two_grids_are_exact_area_averages(factor):
    image = torch.randn(1, 3, 16 * factor, 32 * factor)
    averaged = F.avg_pool2d(image, factor)
    torch.testing.assert_close(grid_patches(image, (2, 4), 8), fixed_patches(averaged, 8), rtol=0, atol=2e-5)


def test_bilinear_reading_is_that_of_scipy():
    ndimage = pytest.importorskip('scipy.ndimage')
    image = torch.randn(1, 1, 13, 17)
    points = torch.rand(1, 3, 4, 5, 2) * 2 - 1
    sampled = sample_patches(image, points, torch.ones(1, 3), 1.0)[0, :, 0]
    rows = (points[0, ..., 1].numpy() + 1) / 2 * 13 - 0.5
    columns = (points[0, ..., 0].numpy() + 1) / 2 * 17 - 0.5
    expected = ndimage.map_coordinates(image[0, 0].numpy(), [rows, columns], order=1, mode='nearest')
    torch.testing.assert_close(sampled, torch.from_numpy(expected), rtol=0, atol=2e-5)


def pixel_average(image: Tensor, points: Tensor, side: float) -> Tensor:
    """Average of boxes, each pixel a constant square: ``(C, H, W)``, ``(..., 2)`` pixels -> ``(C, ...)``.

    From the integral image, which is bilinear between pixel corners.
    """
    integral = F.pad(image.double().cumsum(-1).cumsum(-2), [1, 0, 1, 0])
    ndimage = pytest.importorskip('scipy.ndimage')

    def at(x, y):
        return np.stack([ndimage.map_coordinates(i.numpy(), [y, x], order=1) for i in integral])

    x, y, h = points[..., 0].double().numpy(), points[..., 1].double().numpy(), side / 2
    total = at(x + h, y + h) - at(x - h, y + h) - at(x + h, y - h) + at(x - h, y - h)
    return torch.from_numpy(total / side**2).float()


def continuous_average(image: Tensor, points: Tensor, side: float, fineness: int = 12) -> Tensor:
    """The same for the image that bilinear interpolation makes of the pixels, by dense sampling."""
    offsets = (torch.arange(fineness) + 0.5) / fineness * side - side / 2
    size = torch.tensor([image.shape[-1], image.shape[-2]])
    total = 0
    for dy in offsets:
        for dx in offsets:
            grid = (points + torch.stack([dx, dy])) * 2 / size - 1
            total = total + F.grid_sample(image[None], grid.flatten(0, 1)[None], align_corners=False)
    return (total / fineness**2).reshape(-1, *points.shape[:-1])


@pytest.mark.parametrize(
    ('average', 'scale', 'limit'),
    [
        (continuous_average, 1.4, 0.7),
        (continuous_average, 2, 0.55),
        (continuous_average, 4, 0.40),
        (continuous_average, 8, 0.30),
        (pixel_average, 1.4, 0.75),  # no mix of two levels is below 0.70 here
        (pixel_average, 2, 0.55),
        (pixel_average, 4, 0.40),
        (pixel_average, 8, 0.30),
    ],
)
def test_antialiasing_against_the_true_area_average(photographs, average, scale, limit):
    """Patches at random positions on photographs: how much nearer to the truth than plain bilinear sampling."""
    patch, errors = 16, {'pyramid': 0.0, 'bilinear': 0.0}
    for image in photographs:
        size = torch.tensor([image.shape[-1], image.shape[-2]])
        half = patch * scale / 2  # pixels
        centres = half + torch.rand(1, 50, 2) * (size - 2 * half)
        extents = (half * 2 / size).expand(1, 50, 2)
        geometry = place_inside(
            centres * 2 / size - 1, extents, torch.zeros(1, 50), torch.zeros(1, 50), tuple(image.shape[-2:])
        )
        points = geometry.points(sample_grid((patch, patch), CPU))
        steps = footprint(geometry.image_from_patch, tuple(image.shape[-2:]), (patch, patch))
        torch.testing.assert_close(steps, torch.full_like(steps, scale), rtol=1e-3, atol=0)
        truth = average(image[0], (points[0] + 1) / 2 * size, scale).transpose(0, 1)
        for name, bound in (('pyramid', scale * 1.001), ('bilinear', 1.0)):
            sampled = sample_patches(image, points, steps, bound)[0]
            errors[name] += (sampled - truth).square().mean().item()
    ratio = math.sqrt(errors['pyramid'] / errors['bilinear'])
    assert ratio <= limit, f'{ratio:.3f} of the error of bilinear sampling'


@pytest.mark.parametrize('size', [(95, 95), (97, 211), (261, 131), (255, 257)])
@pytest.mark.parametrize('level', [1, 2, 3, 4])
def test_no_level_drifts_on_odd_sides(size, level):
    """Each coordinate, drawn as an image and read at any level, is where it was read."""
    x, y = torch.meshgrid(torch.arange(size[1]) + 0.5, torch.arange(size[0]) + 0.5, indexing='xy')
    margin = 2.0 ** (level + 1)
    low, high = torch.full((2,), margin), torch.tensor([size[1], size[0]]) - margin
    assert (high > low).all()
    pixels = low + torch.rand(1, 40, 1, 1, 2) * (high - low)
    points = pixels / torch.tensor([size[1], size[0]]) * 2 - 1
    step = 2.0 ** (level + 0.5)  # read half a level below its log2
    sampled = sample_patches(torch.stack([x, y])[None], points, torch.full((1, 40), step), 64.0)
    torch.testing.assert_close(sampled[0, :, :, 0, 0], pixels[0, :, 0, 0], rtol=0, atol=1e-2)


@pytest.mark.parametrize('size', [(1, 1), (1, 9), (6, 5), (16, 16), (23, 64)])
def test_constant_images_stay_constant_at_every_level(size):
    points = torch.rand(2, 9, 3, 3, 2) * 2 - 1
    points[:, 0] = points[:, 0].sign()  # corners of the image
    steps = torch.exp2(torch.rand(2, 9) * 8)
    sampled = sample_patches(torch.full((2, 1, *size), 7.0), points, steps, 256.0)
    torch.testing.assert_close(sampled, torch.full_like(sampled, 7.0), rtol=0, atol=1e-5)


def test_more_levels_than_needed_change_nothing():
    image = torch.randn(1, 2, 37, 51)
    points = torch.rand(1, 9, 3, 3, 2) * 2 - 1
    steps = 1 + 1.5 * torch.rand(1, 9)
    few, many = (sample_patches(image, points, steps, bound) for bound in (2.5, 32.0))
    assert num_mip_levels(2.5, (37, 51)) == 2 < num_mip_levels(32.0, (37, 51))
    torch.testing.assert_close(few, many, rtol=0, atol=1e-4)


def test_samples_may_differ_in_footprint():
    image, points = torch.randn(1, 1, 64, 64), torch.rand(1, 2, 3, 3, 2) * 2 - 1
    steps = 1 + 7 * torch.rand(1, 2)
    spread = steps[..., None, None].expand(1, 2, 3, 3)
    torch.testing.assert_close(sample_patches(image, points, steps, 8.0), sample_patches(image, points, spread, 8.0))


def test_mip_level_is_continuous_and_zero_up_to_one_pixel():
    steps = torch.linspace(0.1, 16, 2000)
    level = mip_level(steps)
    assert (level[steps <= 1] == 0).all()
    assert (level[1:] - level[:-1]).min() >= 0
    assert (level[1:] - level[:-1]).max() < 0.02
    torch.testing.assert_close(mip_level(torch.tensor([2.0, 4.0, 8.0])), torch.tensor([0.5, 1.5, 2.5]))


@pytest.mark.parametrize(('bound', 'size', 'expected'), [
    (0.5, (224, 224), 1), (1.0, (224, 224), 1), (1.2, (224, 224), 2), (2.0, (224, 224), 2), (2.9, (224, 224), 3),
    (4.0, (224, 224), 3), (64.0, (16, 4), 5), (64.0, (1, 1), 1), (64.0, (1, 2), 2),
])  # fmt: skip
def test_number_of_levels(bound, size, expected):
    assert num_mip_levels(bound, size) == expected


@pytest.mark.parametrize('size', [(224, 224), (13, 1), (1, 9), (37, 50)])
def test_levels_are_averages_of_four_pixels(size):
    image = torch.randn(2, 3, *size)
    levels = mip_pyramid(image, 4)
    assert levels[0] is image
    for k in range(1, 4):
        height, width = levels[k - 1].shape[-2:]
        extended = F.pad(levels[k - 1], [0, width % 2, 0, height % 2], mode='replicate')
        torch.testing.assert_close(levels[k], F.avg_pool2d(extended, 2))


@pytest.mark.parametrize('bound', [1.0, 2.5, 16.0])
def test_gradcheck_sampling(bound):
    """With respect to pixels, positions and footprints; away from texel centres, where bilinear reading has kinks."""
    image = torch.randn(1, 1, 12, 16, dtype=torch.float64, requires_grad=True)
    cells = torch.randint(4, 8, (1, 2, 1, 2, 2)).double() + 0.5 + 0.2 + 0.6 * torch.rand(1, 2, 1, 2, 2).double()
    points = (cells / torch.tensor([8.0, 6.0]) - 1).requires_grad_()
    steps = torch.tensor([[1.3, 0.9 * min(bound, 7.0)]], dtype=torch.float64, requires_grad=bound > 1)
    assert torch.autograd.gradcheck(lambda *args: sample_patches(*args, bound), (image, points, steps))


@pytest.mark.parametrize(('name', 'field', 'share'), [('projective', 'perspective', 0.9), ('tps', 'warp', 1.05)])
def test_the_footprint_of_a_warped_patch_follows_its_samples(photographs, name, field, share):
    """Against the average over each sample's own cell: nearer than bilinear sampling, and than one footprint for all.

    The latter in perspective alone: a spline stretches what is next to what it shrinks.
    """
    patch, fineness, errors = 16, 16, {'own': 0.0, 'one': 0.0, 'bilinear': 0.0}
    transform = TRANSFORMS[name](max_perspective=0.7, max_warp=1.0, max_zoom=1.0)
    for image in photographs:
        size = (image.shape[-2], image.shape[-1])
        raw = {each: torch.zeros(1, 30, width) for each, width in transform.fields.items()}
        raw[field] = torch.randn_like(raw[field]) * 2
        centres, extents = torch.rand(30, 2) - 0.5, 1.8 * patch / torch.tensor([size[1], size[0]]).expand(30, 2)
        geometry = transform(raw, Anchors(centres, extents), size)
        local = sample_grid((patch, patch), CPU)
        points, steps = geometry.points(local), footprint(patch_jacobians(geometry, local), size, (patch, patch))
        cells = geometry.points(sample_grid((patch * fineness, patch * fineness), CPU))
        truth = F.avg_pool2d(sample_patches(image, cells, torch.ones(1, 30), 1.0)[0], fineness)
        one = steps.square().mean(dim=(2, 3)).sqrt()
        for key, given, bound in (('own', steps, 64.0), ('one', one, 64.0), ('bilinear', steps, 1.0)):
            errors[key] += (sample_patches(image, points, given, bound)[0] - truth).square().mean().item()
    own, one, bilinear = (math.sqrt(errors[key]) for key in ('own', 'one', 'bilinear'))
    assert own < share * one, (own, one, bilinear)
    assert own < 0.7 * bilinear, (own, one, bilinear)


@pytest.mark.parametrize('max_footprint', [1.0, 2.0, 8.0])
def test_a_position_that_is_not_a_number_does_not_end_the_process(max_footprint):
    points = torch.full((1, 2, 4, 4, 2), float('nan'), requires_grad=True)
    footprint = torch.full((1, 2), float('nan'))
    sample_patches(torch.rand(1, 3, 32, 32), points, footprint, max_footprint).sum().backward()
    assert points.grad.shape == points.shape

"""Pictures show images upright and outlines where the patches lie."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection

from timm_apvit import AdaptivePatching, PatchGeometry
from timm_apvit.visualize import PALETTE, plot_patches


def geometry_of(images: torch.Tensor, transform: str = 'affine', num_patches: int = 6) -> PatchGeometry:
    torch.manual_seed(0)
    patching = AdaptivePatching(4, num_patches, transform, in_chans=images.shape[1])
    for layer in patching.localizer.head.values():
        torch.nn.init.normal_(layer.weight)
    geometry: PatchGeometry = patching(images)[1]
    return geometry


def render(figure: Any) -> np.ndarray[Any, Any]:
    """The pixels of a figure: ``(h, w, 3)``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def pixel_at(figure: Any, axis: Any, xy: tuple[float, float]) -> tuple[int, int]:
    """Row and column in the rendered figure of a point in an axis's data coordinates."""
    x, y = axis.transData.transform(xy)
    return round(figure.bbox.height - y - 0.5), round(x - 0.5)


def test_convention_images_are_upright_and_outlines_in_pixels() -> None:
    images = torch.zeros(1, 3, 20, 40)
    images[0, 0, :5, :10] = 1  # red in the top-left corner
    geometry = geometry_of(images)
    figure = plot_patches(images, geometry, ['a title'])
    left, right = figure.axes
    pixels = render(figure)
    assert tuple(pixels[pixel_at(figure, left, (1, 1))]) == (255, 0, 0)
    assert tuple(pixels[pixel_at(figure, left, (1, 19))]) == (0, 0, 0)
    assert tuple(pixels[pixel_at(figure, left, (39, 1))]) == (0, 0, 0)
    for axis in (left, right):
        top, bottom = pixel_at(figure, axis, (0, 0))[0], pixel_at(figure, axis, (0, 20))[0]
        assert top < bottom
    assert left.get_title() == 'a title'

    lines, dots = right.collections
    assert isinstance(lines, LineCollection)
    drawn = np.stack(lines.get_segments())
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]])
    expected = (geometry.points(corners)[0] + 1) / 2 * torch.tensor([40.0, 20.0])
    np.testing.assert_allclose(drawn, expected.detach().numpy(), atol=1e-4)
    middles = (geometry.centres[0] + 1) / 2 * torch.tensor([40.0, 20.0])
    np.testing.assert_allclose(dots.get_offsets(), middles.detach().numpy(), atol=1e-4)
    assert not left.collections


def test_outlines_are_seen_in_colours_of_the_palette() -> None:
    images = torch.ones(1, 1, 32, 32)
    figure = plot_patches(images, geometry_of(images, num_patches=4))
    figure.set_dpi(400)  # so that lines have an inside that no other colour blends with
    colours = {tuple(int(PALETTE[0][n : n + 2], 16) for n in (1, 3, 5)), (0, 0, 0), (255, 255, 255)}
    assert colours <= {tuple(colour) for colour in render(figure).reshape(-1, 3).tolist()}


def test_figure_has_a_pair_for_each_image_and_holds_any_budget() -> None:
    images = torch.rand(3, 1, 16, 24)
    figure = plot_patches(images, geometry_of(images, num_patches=196), titles=['1', '2', '3'], pairs_per_row=2)
    assert len(figure.axes) == 8
    assert [len(axis.collections) for axis in figure.axes] == [0, 2, 0, 2, 0, 2, 0, 0]
    assert render(figure).std() > 0


@pytest.mark.parametrize(
    ('images', 'titles', 'message'),
    [
        (torch.zeros(3, 8, 8), None, r'shape \(B, 1 or 3, H, W\), got \[3, 8, 8\]'),
        (torch.zeros(2, 2, 8, 8), None, r'got \[2, 2, 8, 8\]'),
        (torch.zeros(0, 3, 8, 8), None, r'got \[0, 3, 8, 8\]'),
        (torch.zeros(3, 3, 8, 8), None, 'geometry of 3 images, got that of 2'),
        (torch.zeros(2, 3, 8, 8), ['one'], 'expected 2 titles, got 1'),
    ],
)
def test_rejects_shapes_that_do_not_fit(images: torch.Tensor, titles: list[str] | None, message: str) -> None:
    geometry = geometry_of(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=message):
        plot_patches(images, geometry, titles)

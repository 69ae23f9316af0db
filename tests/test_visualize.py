"""Pictures show images upright, and outlines, patches and coverage where the patches lie."""

import io
import itertools
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import create, normalised
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.path import Path as Polygon

from timm_apvit import TRANSFORMS
from timm_apvit.patching.coords import sample_grid
from timm_apvit.patching.geometry import patch_jacobians
from timm_apvit.pictures.drawing import PALETTE, colours_in_order, coverage, rendered
from timm_apvit.pictures.figures import PANELS
from timm_apvit.pictures.plots import CLASSIC, animate, animate_training, compare, default_budgets, plot_patches
from timm_apvit.pictures.views import view_patches


def pixel_at(figure: Any, axis: Any, xy: tuple[float, float]) -> tuple[int, int]:
    """Row and column in the rendered figure of a point in an axis's data coordinates."""
    x, y = axis.transData.transform(xy)
    return round(figure.bbox.height - y - 0.5), round(x - 0.5)


def drawn_outlines(axis: Any) -> np.ndarray[Any, Any]:
    lines = next(each for each in axis.collections if isinstance(each, LineCollection))
    return np.stack(lines.get_segments())


def test_convention_images_are_upright() -> None:
    image = torch.zeros(3, 20, 40)
    image[0, :5, :10] = 1  # red in the top-left corner
    model: Any = timm.create_model('test_apvit', img_size=32, num_patches=(2, 4), transform='affine')
    figure = plot_patches(model, image, titles=['a $title'])
    pixels = rendered(figure, 100)
    assert len(figure.axes) == len(CLASSIC)
    for axis in figure.axes:  # the patches have not moved, so that reassembled they are the image
        assert pixels[pixel_at(figure, axis, (3, 1.4))].tolist() == pytest.approx([255, 0, 0], abs=3)
        assert pixels[pixel_at(figure, axis, (3, 18.6))].tolist() == pytest.approx([0, 0, 0], abs=3)
        assert pixels[pixel_at(figure, axis, (36.5, 1.4))].tolist() == pytest.approx([0, 0, 0], abs=3)
        assert pixel_at(figure, axis, (0, 0))[0] < pixel_at(figure, axis, (0, 20))[0]
    assert figure.axes[0].get_title() == 'a $title'
    assert figure.axes[1].get_title() == 'fixed grid\n2x4, 8 patches'


@pytest.mark.parametrize('size', [(48, 96), (90, 40)])
@pytest.mark.parametrize('transform', TRANSFORMS)
def test_convention_what_is_seen_in_the_picture_is_what_the_patch_holds(transform: str, size: tuple[int, int]) -> None:
    """The picture within a drawn outline has the mean colours of the patch that the network took."""
    model: Any = create(img_size=64, num_patches=6, transform=transform)
    columns = torch.linspace(0, 1, size[1]).expand(size)
    rows = torch.linspace(0, 1, size[0])[:, None].expand(size)
    image = torch.stack([columns, rows, torch.zeros(size)])
    figure = plot_patches(model, image, panels=('image', 'outlines'))
    pixels = rendered(figure, 150)
    view = view_patches(model, image)
    # The area of the picture that each sample stands for: a warped patch is denser at one place than at another.
    local = sample_grid(tuple(view.patches.shape[1:3]), torch.device('cpu'))
    areas = torch.linalg.det(patch_jacobians(model.patch_geometry(normalised(model, image)), local))[0]
    areas = areas.expand(view.patches.shape[:3]).unsqueeze(-1).detach()
    expected = (view.patches * areas).sum(dim=(1, 2)) / areas.sum(dim=(1, 2))
    plain, outlined = figure.axes
    height = figure.bbox.height
    for outline, colour in zip(drawn_outlines(outlined), expected, strict=True):
        at = plain.transData.transform(outline)  # of the same image, without lines over it
        points = np.stack(
            np.meshgrid(*(np.arange(np.floor(a), np.ceil(b)) for a, b in zip(at.min(0), at.max(0), strict=True))), -1
        )
        points = points.reshape(-1, 2)
        within = points[Polygon(at).contains_points(points + 0.5)].astype(int)
        seen = pixels[(height - 1 - within[:, 1]).astype(int), within[:, 0]] / 255
        assert len(seen) > 100
        np.testing.assert_allclose(seen.mean(axis=0)[:2], colour[:2].numpy(), atol=0.02)


@pytest.mark.parametrize('transform', TRANSFORMS)
def test_lines_are_drawn_along_the_outlines(transform: str) -> None:
    model: Any = create(img_size=64, num_patches=5, transform=transform)
    image = torch.ones(3, 48, 96)
    figure = plot_patches(model, image, panels=('outlines',))
    pixels = rendered(figure, 300)
    for outline, colour in zip(
        drawn_outlines(figure.axes[0]), colours_in_order(view_patches(model, image)), strict=True
    ):
        hits = [
            np.abs(pixels[pixel_at(figure, figure.axes[0], tuple(point))] / 255 - to_rgb(colour)).max() < 0.2
            for point in outline[:-1]
        ]
        assert np.mean(hits) > 0.1  # elsewhere others lie on top


def test_reassembled_patches_wear_the_colours_of_their_outlines() -> None:
    model: Any = create(img_size=64, num_patches=(2, 3))
    figure = plot_patches(model, torch.rand(3, 40, 60), panels=('adaptive', 'outlines', 'sheet'))
    colours = [axis.collections[0].get_colors() for axis in figure.axes]
    assert len(colours[0]) == 6
    np.testing.assert_array_equal(colours[0], colours[1])
    np.testing.assert_array_equal(colours[0], colours[2])
    np.testing.assert_allclose(colours[0][0][:3], to_rgb(PALETTE[0]))


@pytest.mark.parametrize('grid', [(14, 14), (7, 7), (6, 6), (4, 8), (1, 5), (5, 1)])
def test_neighbours_differ_in_colour(grid: tuple[int, int]) -> None:
    model: Any = create(img_size=64, num_patches=grid)
    colours = np.array(colours_in_order(view_patches(model, torch.rand(3, 9, 9)))).reshape(grid)
    assert (colours[1:] != colours[:-1]).all()
    assert (colours[:, 1:] != colours[:, :-1]).all()


def test_attention_colours_lines_and_has_a_bar() -> None:
    model: Any = create(img_size=64, num_patches=5)
    torch.nn.init.normal_(model.blocks[-1].attn.qkv.weight, std=0.5)
    image = torch.rand(3, 40, 60)
    figure = plot_patches(model, image, panels=('outlines',), color_by='attention')
    axis, bar = figure.axes
    assert bar.get_ylabel() == 'attention (1: an even share)'
    attention = view_patches(model, image, attention=True).attention
    assert attention is not None
    order = attention.argsort()
    lines = drawn_outlines(axis)
    expected = view_patches(model, image).outlines[order]
    np.testing.assert_allclose(lines, expected.numpy())
    brightness = axis.collections[0].get_colors()[:, :3].sum(axis=1)
    assert (np.diff(brightness) >= 0).all()
    assert brightness[-1] > brightness[0]


def test_sheet_shows_every_sample_in_order() -> None:
    model: Any = create(img_size=64, num_patches=(2, 3))
    image = torch.rand(3, 40, 60)
    figure = plot_patches(model, image, panels=('sheet',))
    (axis,) = figure.axes
    sheet = axis.images[0].get_array()
    patches = view_patches(model, image).patches.numpy()
    frames = axis.collections[0].get_segments()
    for patch, frame in zip(patches, frames, strict=True):
        left, top = np.ceil(frame.min(axis=0)).astype(int)
        np.testing.assert_allclose(sheet[top : top + 16, left : left + 16], patch, atol=1e-6)


def test_coverage_and_attention_have_a_bar_each() -> None:
    model: Any = create(img_size=64, num_patches=5)
    figure = plot_patches(model, torch.rand(3, 40, 60), panels=('sheet', 'coverage'), color_by='attention')
    figure.savefig(io.BytesIO(), format='png')  # where the layout is found
    assert {axis.get_ylabel() for axis in figure.axes[2:]} == {'patches', 'attention (1: an even share)'}


def test_coverage_counts_the_patches_over_each_place() -> None:
    unmoved: Any = timm.create_model('test_apvit', img_size=64, num_patches=(3, 5))
    assert (coverage(view_patches(unmoved, torch.rand(3, 30, 90))) == 1).mean() > 0.99
    moved: Any = create(img_size=64, num_patches=7, transform='affine')
    view = view_patches(moved, torch.rand(3, 30, 90))
    counts = coverage(view)
    assert counts.shape == (85, 256)
    polygons, compared = [Polygon(outline.numpy()) for outline in view.outlines], 0
    for x, y in itertools.product(range(2, 88, 7), range(2, 28, 5)):
        around = {
            sum(polygon.contains_point((x + 0.5 + dx, y + 0.5 + dy)) for polygon in polygons)
            for dx, dy in itertools.product((-0.4, 0, 0.4), repeat=2)
        }
        if len(around) == 1:  # no outline passes here, which a cell of the map would be on one side of
            assert counts[int((y + 0.5) * 85 / 30), int((x + 0.5) * 256 / 90)] == around.pop()
            compared += 1
    assert compared > 20
    x, y = view.outlines.numpy()[..., 0], view.outlines.numpy()[..., 1]
    areas = np.abs((x[:, :-1] * y[:, 1:] - x[:, 1:] * y[:, :-1]).sum(axis=1)) / 2
    assert counts.mean() == pytest.approx(areas.sum() / (30 * 90), rel=0.05)


def test_several_images_of_any_size_make_a_grid() -> None:
    model: Any = create(img_size=64, num_patches=4)
    images = [torch.rand(3, *size) for size in ((1, 1), (2, 300), (300, 2), (40, 60), (224, 224))]
    figure = plot_patches(model, images, panels=('image', 'outlines'), titles=list('abcde'), images_per_row=2)
    assert len(figure.axes) == 12
    assert [axis.axison for axis in figure.axes] == [True] * 10 + [False] * 2
    pixels = rendered(figure, 60)
    assert pixels.std() > 0
    for axis in figure.axes[:10]:
        box = axis.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
        assert min(box.width, box.height) > 20
    assert len(plot_patches(model, torch.rand(3, 3, 20, 30), panels=('image',)).axes) == 3


def no_overlap(figure: Any) -> None:
    """Titles and panels stay apart and inside the figure."""
    rendered(figure, 80)
    boxes = [axis.get_tightbbox() for axis in figure.axes if axis.axison]
    for n, box in enumerate(boxes):
        assert box.x0 >= -3
        assert box.y0 >= -3
        assert box.x1 <= figure.bbox.width + 3
        assert box.y1 <= figure.bbox.height + 3
        for other in boxes[:n]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            along = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(across, along) < 3


@pytest.mark.parametrize('size', [(40, 60), (60, 40), (10, 90), (90, 10)])
def test_titles_and_panels_do_not_overlap(size: tuple[int, int]) -> None:
    model: Any = create(img_size=64, num_patches=7)
    names = ['a very long name of a file, longer than its panel is.jpeg', 33 * 'W']
    for color_by in ('order', 'attention'):
        no_overlap(plot_patches(model, torch.rand(2, 3, *size), titles=names, color_by=color_by))
    no_overlap(plot_patches(model, torch.rand(2, 3, *size), panels=tuple(PANELS), titles=names))
    no_overlap(compare(model, torch.rand(2, 3, *size), (1, 4, 196), titles=names))


def test_long_titles_keep_their_ends() -> None:
    model: Any = create(img_size=64, num_patches=7)
    shown = {}
    for name in ('short.jpeg', 'a' + 250 * 'W' + 'z.jpeg', 'a' + 250 * 'i' + 'z.jpeg', '$x$ ' * 20):
        figure = plot_patches(model, torch.rand(3, 20, 20), titles=[name])
        shown[name] = figure.axes[0].get_title()
    short, wide, narrow, dollars = shown.values()
    assert short == 'short.jpeg'
    assert wide.startswith('aW')
    assert wide.endswith('Wz.jpeg')
    assert 10 < len(wide) < 30 < len(narrow) < 120
    assert dollars.count('…') == 1


def test_compare_has_a_column_for_each_budget_and_leaves_the_model() -> None:
    model: Any = create(img_size=64, num_patches=(4, 4)).train()
    figure = compare(model, [torch.rand(3, 40, 60)] * 2, (1, (2, 3), 7), titles=['a', 'b'])
    assert len(figure.axes) == 12
    assert [len(drawn_outlines(axis)) for axis in figure.axes] == [1, 6, 7] * 4
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:4] == ['a\n1 patch', '2x3, 6 patches', '7 patches', 'adaptive patches']
    assert titles[6] == 'b\n1 patch'
    assert model.patch_embed.requested == (4, 4)
    assert model.training
    assert default_budgets(model) == [1, 4, 8, (4, 4)]
    assert len(compare(model, torch.rand(3, 9, 9)).axes) == 8


def test_figure_is_shown_by_notebooks_and_can_be_pickled() -> None:
    model: Any = create(img_size=64, num_patches=4)
    figure: Any = plot_patches(model, torch.rand(3, 20, 20), panels=('image',))
    assert figure._repr_png_().startswith(b'\x89PNG')
    assert len(pickle.loads(pickle.dumps(figure)).axes) == 1


def test_196_patches_are_told_apart() -> None:
    model: Any = timm.create_model('test_apvit', img_size=64, num_patches=(14, 14))
    image = torch.full((3, 224, 224), 0.5)
    figure = plot_patches(model, image)
    pixels = rendered(figure, 150)
    axis = figure.axes[3]
    middles = [pixel_at(figure, axis, (16 * column + 8, 16 * row + 8)) for row in range(14) for column in range(14)]
    for middle in middles:  # the image is seen within each outline
        assert pixels[middle].tolist() == pytest.approx([128] * 3, abs=2)


@pytest.mark.parametrize(
    ('draw', 'message'),
    [
        (lambda model: plot_patches(model, torch.rand(2, 3, 8, 8), titles=['one']), 'expected 2 titles, got .*one'),
        (lambda model: plot_patches(model, []), 'expected one image or more, got none'),
        (lambda model: plot_patches(model, torch.rand(0, 3, 8, 8)), 'expected one image or more, got none'),
        (lambda model: plot_patches(model, torch.rand(8, 8)), r'shape \(3, H, W\), got \[8, 8\]'),
        (lambda model: plot_patches(model, torch.rand(3, 8, 8), panels=('image', 'x')), 'expected panels among image'),
        (lambda model: plot_patches(model, torch.rand(3, 8, 8), panels='image'), 'expected panels among image'),
        (lambda model: plot_patches(model, torch.rand(3, 8, 8), panels=()), 'expected panels among image'),
        (lambda model: plot_patches(model, torch.rand(3, 8, 8), color_by='x'), 'one of order, attention, got'),
        (lambda model: plot_patches(model, torch.rand(3, 8, 8), 0), 'expected num_patches'),
        (lambda model: plot_patches(model, torch.rand(3, 8, 8), images_per_row=0), 'images_per_row >= 1, got 0'),
        (lambda model: compare(model, torch.rand(3, 8, 8), ()), 'one number of patches or more, got none'),
        (lambda model: compare(model, torch.rand(3, 8, 8), 4), r'numbers of patches, such as \[16, 49\], got 4'),
        (lambda model: plot_patches(model, torch.rand(2, 3, 8, 8), titles='one'), 'expected 2 titles, got .*one'),
        (lambda model: animate(model, torch.rand(3, 8, 8), (1,), seconds=-1), 'seconds between 0.01 and .*, got -1'),
        (lambda model: animate(model, torch.rand(3, 8, 8), ()), 'one number of patches or more, got none'),
        (lambda model: animate_training([], torch.rand(3, 8, 8)), 'one model or more, got none'),
        (lambda model: plot_patches(model.blocks, torch.rand(3, 8, 8)), 'expected an APViT, got Sequential'),
    ],
)
def test_rejects_what_cannot_be_drawn(draw: Callable[[Any], Any], message: str) -> None:
    model = create(img_size=32, num_patches=4)
    with pytest.raises(ValueError, match=message):
        draw(model)


def test_rejects_to_draw_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith('matplotlib')] + ['timm_apvit.pictures.drawing']:
        monkeypatch.setitem(sys.modules, name, None if name.startswith('matplotlib') else sys.modules[name])
    monkeypatch.delitem(sys.modules, 'timm_apvit.pictures.drawing')
    monkeypatch.delattr('timm_apvit.pictures.drawing')
    with pytest.raises(ModuleNotFoundError, match=r"a picture needs matplotlib: pip install 'timm-apvit\[pictures\]'"):
        plot_patches(create(img_size=32), torch.rand(3, 8, 8))

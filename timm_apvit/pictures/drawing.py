"""Panels of a picture: each function draws one of them into an axis. Needs matplotlib."""

import io
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from timm_apvit.pictures.views import PatchView, finest, leaf_mosaic, mosaic

Array = np.ndarray[Any, Any]

# Okabe and Ito's palette, which stays apart for colour-blind readers, without its black and its dark blue, which are
# lost on dark ground.
PALETTE = ('#E69F00', '#56B4E9', '#009E73', '#F0E442', '#D55E00', '#CC79A7')
SCALE = 'cividis'  # made for colour-blind readers
DARKEST = 0.25  # of that scale, where it colours lines
FEW = 64  # patches up to which lines are thick and centres are marked
# Panels narrower or wider than this would not fit a page: there an image is stretched.
NARROWEST = 1 / 6
TITLE_SIZE = 9  # points
HEAT_CELLS = 256  # of a coverage map along its longer side


class Picture(Figure):
    """A matplotlib figure that notebooks show whether or not pyplot has been imported."""

    def _repr_png_(self) -> bytes:
        return file_bytes(self)


def file_bytes(figure: Any, kind: str = 'png', dpi: int = 100) -> bytes:
    """A figure as a file of a kind that matplotlib writes, without empty margins."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=dpi, bbox_inches='tight', pad_inches=0.05)
    return file.getvalue()


def rendered(figure: Any, dpi: int) -> Array:
    """The pixels of a figure: ``(h, w, 3)``, bytes."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels: Array = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return pixels


def gif_bytes(frames: Sequence[Array], seconds: float) -> bytes:
    """Frames ``(h, w, 3)`` of one size as a GIF file, whose 256 colours have those of lines among them."""
    lines = [*map(to_rgb, ('white', 'black', *PALETTE)), *colormaps[SCALE](np.linspace(DARKEST, 1, 24))[:, :3].tolist()]
    # Thin lines are too few pixels to be given colours of their own by the frames.
    common = Image.fromarray(np.concatenate([frame[::2, ::2] for frame in frames])).quantize(256 - len(lines))
    colours = np.reshape(common.getpalette() or [], (-1, 3))[: 256 - len(lines)]
    palette = np.concatenate([np.rint(255 * np.array(lines)), colours])
    shown = []
    for frame in frames:
        # Pillow's own choice of the nearest colour is a rough one, and may take white for light grey.
        found, places = np.unique(frame @ np.array([1 << 16, 1 << 8, 1]), return_inverse=True)
        values = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1)
        nearest = ((palette**2).sum(axis=1) - 2 * values @ palette.T).argmin(axis=1)
        shown.append(Image.fromarray(nearest[places].reshape(frame.shape[:2]).astype(np.uint8)))
        shown[-1].putpalette(palette.astype(np.uint8).tobytes())
    file = io.BytesIO()
    shown[0].save(file, 'GIF', save_all=True, append_images=shown[1:], duration=round(1000 * seconds), loop=0)
    return file.getvalue()


def panel_aspect(view: PatchView) -> float:
    """Height over width of a panel."""
    height, width = view.pixels.shape[:2]
    return min(max(height / width, NARROWEST), 1 / NARROWEST)


def colours_in_order(view: PatchView) -> list[Any]:
    """A colour for each patch, by its place: neighbours along a row and along a column differ."""
    if view.leaves is not None:
        places = ((view.leaves[0] + 1) / (2 * view.leaves[1])).long().tolist()
        return [PALETTE[(column + 3 * row) % len(PALETTE)] for column, row in places]
    return [
        PALETTE[(column + 3 * row) % len(PALETTE)]
        for grid in view.layout.grids
        for row, length in enumerate(grid.lengths)
        for column in range(length)
    ]


def attention_scale(attentions: Sequence[Tensor]) -> Any:
    """Colours of the attention that patches receive, each ``(N,)``, from 0 to the most of all.

    They go by its square root: a few patches receive most of it, and the others would all look alike.
    """
    shades = colormaps[SCALE](np.linspace(DARKEST, 1, 256))
    most = max(float(each.max()) for each in attentions)
    return ScalarMappable(PowerNorm(0.5, 0, most), ListedColormap(shades))


def draw_image(axis: Any, view: PatchView) -> None:
    """The image as it is."""
    _show(axis, view, view.pixels.numpy())


def draw_fixed(axis: Any, view: PatchView) -> None:
    """The patches of a fixed grid, each in its place."""
    _show(axis, view, mosaic(view.fixed, view.layout).numpy())
    cells = _cells(view, inset=0.0)
    axis.add_collection(LineCollection(list(cells), colors='white', linewidths=_thickness(view)))


def draw_adaptive(axis: Any, view: PatchView, colours: Sequence[Any]) -> None:
    """The adaptive patches of the finest grid, each in the place of its anchor, framed in the colour of its outline."""
    leaves = view.leaves
    pixels = mosaic(view.patches, view.layout) if leaves is None else leaf_mosaic(view.patches, *leaves)
    _show(axis, view, pixels.numpy())
    cells, (_, first) = _cells(view, inset=0.05, anchors=leaves), finest(view.layout)
    axis.add_collection(
        LineCollection(list(cells), colors=list(colours[first : first + len(cells)]), linewidths=_thickness(view))
    )


def draw_outlines(axis: Any, view: PatchView, colours: Sequence[Any]) -> None:
    """The image with each patch's outline; those with most attention lie on top."""
    draw_image(axis, view)
    width = _thickness(view)
    order: list[int] = list(range(len(view.outlines))) if view.attention is None else view.attention.argsort().tolist()
    chosen = [colours[n] for n in order]
    lines = LineCollection(list(view.outlines.numpy()[order]), colors=chosen, linewidths=width, clip_on=False)
    # A dark rim keeps every colour visible on bright ground.
    lines.set_path_effects([withStroke(linewidth=2 * width, foreground='black')])
    axis.add_collection(lines)
    if len(view.centres) <= FEW:
        dots = axis.scatter(*view.centres.numpy()[order].T, s=16, c=chosen, edgecolors='black', linewidths=0.5)
        dots.set_zorder(3)
    if view.window is not None:
        (frame,) = axis.plot(*view.window.numpy().T, color='white', linestyle=(0, (4, 2)), linewidth=1.6, clip_on=False)
        frame.set_path_effects([withStroke(linewidth=3, foreground='black')])
        frame.set_zorder(4)


def draw_sheet(axis: Any, view: PatchView, colours: Sequence[Any]) -> None:
    """Contact sheet: the patches in their order, sample for sample, apart from each other."""
    patches = view.patches.numpy()
    num, height, width, _ = patches.shape
    # As many columns as give the sheet the shape of the panel.
    columns = min(num, max(1, round((num * height / (width * panel_aspect(view))) ** 0.5)))
    rows = -(-num // columns)
    gap = max(2, round(0.2 * max(height, width)))
    sheet = np.ones((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), dtype=np.float32)
    frames = []
    for n, patch in enumerate(patches):
        top, left = gap + n // columns * (height + gap), gap + n % columns * (width + gap)
        sheet[top : top + height, left : left + width] = patch
        x, y, pad = (left, left + width), (top, top + height), gap / 5
        frames.append(_rectangle(x[0] - pad, y[0] - pad, x[1] + pad, y[1] + pad))
    axis.imshow(sheet, interpolation='nearest', extent=(0, sheet.shape[1], sheet.shape[0], 0))
    axis.set(xlim=(0, sheet.shape[1]), ylim=(sheet.shape[0], 0))
    axis.set_axis_off()
    axis.add_collection(LineCollection(frames, colors=list(colours), linewidths=_thickness(view)))


def draw_coverage(axis: Any, view: PatchView, most: float) -> Any:
    """How many patches see each place; returns what a colour bar needs."""
    counts = coverage(view)
    return _show(axis, view, counts, cmap=SCALE, vmin=0, vmax=most)


def add_title(axis: Any, title: str, width: float) -> None:
    """Write lines above a panel of a width in inches; of one that is longer the middle is left out."""
    lines = [shortened(line, width) for line in title.splitlines()]
    axis.set_title('\n'.join(lines), fontsize=TITLE_SIZE, parse_math=False)


def shortened(line: str, width: float) -> str:
    """A line that fits a width in inches in the type of titles: itself, or as much of its two ends."""
    font = FontProperties(size=TITLE_SIZE)

    def ends(kept: int) -> str:
        return f'{line[: kept - kept // 2]}…{line[len(line) - kept // 2 :]}'

    def is_wider(text: str) -> bool:
        points, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
        return bool(points > 72 * width)

    if not is_wider(line):
        return line
    most = bisect_left(range(len(line)), True, key=lambda kept: is_wider(ends(kept))) - 1
    return ends(max(most, 1))


def add_bar(figure: Any, mappable: Any, label: str, whole: bool) -> None:
    """Add a colour bar to a figure, of whole numbers or any."""
    panels = [axis for axis in figure.axes if axis.get_subplotspec() is not None]  # and not the bars before it
    bar = figure.colorbar(mappable, ax=panels, fraction=0.03, pad=0.01, aspect=30)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.locator = MaxNLocator(nbins=6, integer=whole)


def coverage(view: PatchView) -> Array:
    """How many patches see each of about 256 x 256 cells that tile the image: ``(h, w)``."""
    height, width = view.pixels.shape[:2]
    step = max(height, width) / HEAT_CELLS
    size = max(1, round(height / step)), max(1, round(width / step))
    scale = np.array([size[1] / width, size[0] / height])
    counts = np.zeros(size, dtype=int)
    for outline in view.outlines.numpy() * scale:
        (left, top), (right, bottom) = np.floor(outline.min(axis=0)).clip(0), np.ceil(outline.max(axis=0))
        x = np.arange(int(left), min(size[1], int(right))) + 0.5
        y = np.arange(int(top), min(size[0], int(bottom))) + 0.5
        points = np.stack(np.meshgrid(x, y), axis=-1)
        inside = Path(outline).contains_points(points.reshape(-1, 2)).reshape(len(y), len(x))
        counts[int(top) : int(top) + len(y), int(left) : int(left) + len(x)] += inside
    return counts


def _show(axis: Any, view: PatchView, pixels: Array, **kwargs: Any) -> Any:
    """Lay pixels over the extent of the image, without ticks, y downwards."""
    height, width = view.pixels.shape[:2]
    # Enlarged pixels stay what they are; a fine image in a small panel is averaged.
    shown = axis.imshow(pixels, extent=(0, width, height, 0), interpolation='auto', **kwargs)
    axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0), aspect=panel_aspect(view) * width / height)
    return shown


def _cells(view: PatchView, inset: float, anchors: tuple[Tensor, Tensor] | None = None) -> Array:
    """Rectangles of anchors in pixels, those of the layout if none are given, smaller by a share: ``(N, 5, 2)``."""
    own = anchors or finest(view.layout)[0].anchors(torch.device('cpu'))[:2]
    centres, extents = (points.numpy() for points in own)
    corners = np.array(_rectangle(-1, -1, 1, 1))
    size = np.array([view.pixels.shape[1], view.pixels.shape[0]])
    points: Array = (centres[:, None] + (1 - inset) * extents[:, None] * corners + 1) / 2 * size
    return points


def _rectangle(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    """Closed outline of a rectangle."""
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]


def _thickness(view: PatchView) -> float:
    return 1.2 if len(view.outlines) <= FEW else 0.6

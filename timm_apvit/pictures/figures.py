"""Figures: panels laid out in rows, with their titles and the scales that they share."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from timm_apvit.failures import require
from timm_apvit.pictures.views import PatchView

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    'image': 'the image',
    'fixed': 'fixed grid',
    'adaptive': 'adaptive patches',
    'outlines': 'where they lie',
    'sheet': 'as the network sees them',
    'coverage': 'patches that see a place',
}
WIDTHS = {1: 7.0, 2: 4.5, 3: 3.2}  # of a panel in inches, by how many are side by side
NARROW = 2.6
MANY = 64  # patches from which a panel has to be larger than others to be legible

Cell = tuple[PatchView, str, str]
"""A view, the name of a panel and its title."""


class Scales(NamedTuple):
    """What the panels of a figure, or of all frames of an animation, have in common.

    Attributes:
        dense: whether panels are drawn larger.
        attention: colours of the attention that patches receive; None: they are coloured by their order.
        most: the most patches that see one place; 0 where no panel shows that.
    """

    dense: bool
    attention: Any | None
    most: int


def common_scales(cells: Iterable[Cell]) -> Scales:
    """Scales that serve all these panels alike."""
    drawing = load_drawing()
    cells = list(cells)
    attentions = [view.attention for view, _, _ in cells if view.attention is not None]
    return Scales(
        dense=any(view.layout.num_patches > MANY for view, _, _ in cells),
        attention=drawing.attention_scale(attentions) if attentions else None,
        most=max((int(drawing.coverage(view).max()) for view, panel, _ in cells if panel == 'coverage'), default=0),
    )


def counted_patches(view: PatchView) -> str:
    """How many patches a view has, in words."""
    number, grids = view.layout.num_patches, [each for each in view.layout.grids if each.num_patches > 1]
    shown = ' + '.join(f'{each.grid[0]}x{each.grid[1]}' for each in grids if each.num_patches % each.rows == 0)
    grid = f'{shown}, ' if shown else ''
    return f'{grid}{number} patch{"es" if number > 1 else ""}'


def panel_cells(view: PatchView, name: str, panels: Sequence[str]) -> list[Cell]:
    """A view's panels with their titles: the image's name above the first, and once how many patches there are."""
    counted = next((n for n, panel in enumerate(panels) if panel != 'image'), None)
    cells: list[Cell] = []
    for n, panel in enumerate(panels):
        lines = printable(name) if n == 0 else []
        if panel != 'image' or not lines:
            lines.append(PANELS[panel])
        cells.append((view, panel, '\n'.join([*lines, *([counted_patches(view)] if n == counted else [])])))
    return cells


def printable(name: str) -> list[str]:
    """A name in no or one line, without what no font can show."""
    return [''.join(c if c.isprintable() else '?' for c in name)] if name else []


def load_drawing() -> Any:
    """The module that needs matplotlib."""
    require('matplotlib', 'a picture', "'timm-apvit[pictures]'")
    from timm_apvit.pictures import drawing

    return drawing


def check_picture(option: str, path: str, endings: Sequence[str] = (), also: Sequence[str] = ()) -> None:
    """Raise ValueError unless a picture can be written into a file of this ending; which are all that matplotlib knows.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    load_drawing()
    from matplotlib.backend_bases import FigureCanvasBase

    endings = [*also, *(endings or sorted(FigureCanvasBase.get_supported_filetypes()))]
    if Path(path).suffix[1:].lower() not in endings:
        raise ValueError(f'expected {option} to end in .{", .".join(endings)}, got {path!r}')


def draw_figure(rows: list[list[Cell]], scales: Scales | None = None) -> 'Figure':
    """Draw rows of panels.

    Args:
        rows: of any lengths.
        scales: as of all frames of an animation; None: those that these panels have in common.
    """
    drawing = load_drawing()
    scales = scales or common_scales(cell for row in rows for cell in row)
    columns = max(map(len, rows))
    width = WIDTHS.get(columns, NARROW)
    if columns > 1 and scales.dense:
        width *= 1.4
    heights = [
        max(width * drawing.panel_aspect(view) + 0.2 + 0.18 * len(title.splitlines()) for view, _, title in row)
        for row in rows
    ]
    bars = (scales.attention is not None) + (scales.most > 0)
    figure: Figure = drawing.Picture(figsize=(width * columns + 0.8 * bars, sum(heights)), layout='compressed')
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={'height_ratios': heights})
    for axis in axes.flat:
        axis.set_axis_off()
    heat = None
    for row, row_axes in zip(rows, axes, strict=True):
        for axis, (view, panel, title) in zip(row_axes, row, strict=False):
            axis.set_axis_on()
            drawing.add_title(axis, title, width)
            if panel == 'coverage':
                heat = drawing.draw_coverage(axis, view, scales.most)
            elif panel in ('image', 'fixed'):
                getattr(drawing, f'draw_{panel}')(axis, view)
            else:
                scale = scales.attention
                colours = drawing.colours_in_order(view) if scale is None else scale.to_rgba(view.attention)
                getattr(drawing, f'draw_{panel}')(axis, view, colours)
    if heat is not None:
        drawing.add_bar(figure, heat, 'patches', whole=True)
    if scales.attention is not None:
        drawing.add_bar(figure, scales.attention, 'attention (1: an even share)', whole=False)
    return figure

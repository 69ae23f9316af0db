"""Figures: panels laid out in rows, with their titles and the scales that they share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from timm_apvit.views import PatchView

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

Cell = tuple[PatchView, str, str]
"""A view, the name of a panel and its title."""


def is_crowded(view: PatchView) -> bool:
    """Whether a panel of a view has to be larger than others to be legible."""
    return view.layout[0] > 64


def counted_patches(view: PatchView) -> str:
    """How many patches a view has, in words."""
    number, rows = view.layout
    grid = f'{rows}x{number // rows}, ' if number % rows == 0 and number > 1 else ''
    return f'{grid}{number} patch{"es" if number > 1 else ""}'


def panel_cells(view: PatchView, name: str, panels: Sequence[str]) -> list[Cell]:
    """A view's panels with their titles: the image's name above the first, and once how many patches there are."""
    counted = next((n for n, panel in enumerate(panels) if panel != 'image'), None)
    cells: list[Cell] = []
    for n, panel in enumerate(panels):
        lines = shortened(name) if n == 0 else []
        if panel != 'image' or not lines:
            lines.append(PANELS[panel])
        cells.append((view, panel, '\n'.join([*lines, *([counted_patches(view)] if n == counted else [])])))
    return cells


def shortened(name: str) -> list[str]:
    """A name that fits above a panel, in no or one line, without what no font can show."""
    clean = ''.join(c if c.isprintable() else '?' for c in name)
    return [clean if len(clean) <= 34 else f'{clean[:16]}…{clean[-17:]}'] if clean else []


def load_drawing() -> Any:
    """The module that needs matplotlib."""
    try:
        from timm_apvit import drawing
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith('matplotlib'):
            raise
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'timm-apvit[pictures]'") from None
    return drawing


def draw_figure(rows: list[list[Cell]], crowded: bool = False) -> 'Figure':
    """Draw rows of panels; scales are those of all of them.

    Args:
        rows: of any lengths.
        crowded: draw the panels larger, as where there are many patches.
    """
    drawing = load_drawing()
    cells = [cell for row in rows for cell in row]
    columns = max(map(len, rows))
    width = WIDTHS.get(columns, NARROW)
    if columns > 1 and (crowded or any(is_crowded(view) for view, _, _ in cells)):
        width *= 1.4
    heights = [
        max(width * drawing.panel_aspect(view) + 0.2 + 0.18 * len(title.splitlines()) for view, _, title in row)
        for row in rows
    ]
    attentions = [view.attention for view, _, _ in cells if view.attention is not None]
    scale = drawing.attention_scale(attentions) if attentions else None
    most = max((drawing.coverage(view).max() for view, panel, _ in cells if panel == 'coverage'), default=0)
    figure: Figure = drawing.Picture(
        figsize=(width * columns + 0.8 * (bool(attentions) + bool(most)), sum(heights)), layout='compressed'
    )
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={'height_ratios': heights})
    for axis in axes.flat:
        axis.set_axis_off()
    heat = None
    for row, row_axes in zip(rows, axes, strict=True):
        for axis, (view, panel, title) in zip(row_axes, row, strict=False):
            axis.set_axis_on()
            axis.set_title(title, fontsize=9, parse_math=False)
            if panel == 'coverage':
                heat = drawing.draw_coverage(axis, view, most)
            elif panel in ('image', 'fixed'):
                getattr(drawing, f'draw_{panel}')(axis, view)
            else:
                colours = drawing.colours_in_order(view) if scale is None else scale.to_rgba(view.attention)
                getattr(drawing, f'draw_{panel}')(axis, view, colours)
    if heat is not None:
        drawing.add_bar(figure, heat, 'patches', whole=True)
    if scale is not None:
        drawing.add_bar(figure, scale, 'attention (1: an even share)', whole=False)
    return figure

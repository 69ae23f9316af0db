"""Pictures of what a model looks at: where its patches lie, what they hold, and how attention falls on them.

`plot_patches` draws any images, whatever their sizes; `compare` draws them at several numbers of patches, and `animate`
makes a GIF of that; `animate_training` makes one of several models. What each image is drawn as is a choice of panels.
"""

import os
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from timm_apvit.models.mixin import APViT, check_apvit, crowds
from timm_apvit.patching.anchors import NumPatches
from timm_apvit.pictures.figures import (
    PANELS,
    Cell,
    common_scales,
    counted_patches,
    draw_figure,
    load_drawing,
    panel_cells,
    printable,
)
from timm_apvit.pictures.images import read_image
from timm_apvit.pictures.views import view_patches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from timm_apvit.pictures.images import AnyImage

CLASSIC = ('image', 'fixed', 'adaptive', 'outlines')
COLOURED_BY = ('order', 'attention')
SHORTEST, LONGEST = 0.01, 655.35  # that a frame of a GIF stays, in seconds


def plot_patches(
    model: APViT,
    images: 'AnyImage | Sequence[AnyImage]',
    num_patches: NumPatches | None = None,
    *,
    panels: Sequence[str] = CLASSIC,
    color_by: str = 'order',
    titles: Sequence[str] | None = None,
    images_per_row: int = 1,
) -> 'Figure':
    """Draw what a model sees of one image or several, of any sizes: a row of panels each.

    The panels are ``image``; ``fixed``, a fixed grid's patches; ``adaptive``, the adaptive patches reassembled, framed
    in the colours of their outlines; ``outlines``, where these lie in the image, with a dashed frame around where the
    anchors were put if the model focuses; ``sheet``, the patches apart, as the network sees them; ``coverage``, how
    many patches see each place. A patch's outline is where it is sampled: turned, sheared or curved as it is.

    Convention:
        As on the screen: x points right and y points down, in pixels; (0, 0) is the image's top-left corner.

    Args:
        model: in any mode; it is run in eval mode, and left as it was.
        images: each a path, an image of Pillow, an array ``(H, W, 3)`` of bytes or a tensor ``(C, H, W)`` in [0, 1],
            before it is normalised; see `timm_apvit.pictures.images.read_image`. A tensor ``(B, C, H, W)`` is B images.
        num_patches: N or ``(gh, gw)``; None: those of the model.
        panels: of each image, from left to right.
        color_by: ``'order'``, so that neighbours differ, or ``'attention'``, that a patch receives from the class
            token or, where the classifier does not take that, from the mean patch.
        titles: one for each image.
        images_per_row: side by side.

    Returns:
        A figure, which a notebook shows and ``savefig`` writes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        FileNotFoundError: there is no such image.
        ValueError: an argument that is none of these.
    """
    read, names = _checked(model, images, titles, panels, color_by)
    if images_per_row < 1:
        raise ValueError(f'expected images_per_row >= 1, got {images_per_row}')
    views = [view_patches(model, image, num_patches, color_by == 'attention') for image in read]
    groups = [panel_cells(view, name, panels) for view, name in zip(views, names, strict=True)]
    return draw_figure([list(chain(*groups[n : n + images_per_row])) for n in range(0, len(groups), images_per_row)])


def compare(
    model: APViT,
    images: 'AnyImage | Sequence[AnyImage]',
    num_patches: Sequence[NumPatches] | None = None,
    *,
    panels: Sequence[str] = ('outlines', 'adaptive'),
    color_by: str = 'order',
    titles: Sequence[str] | None = None,
) -> 'Figure':
    """Draw what a model sees of images at several numbers of patches: a column each, a row for each image and panel.

    Args:
        model: as in `plot_patches`.
        images: as in `plot_patches`.
        num_patches: of each column; None: a sixteenth, a quarter, half and all of the model's own.
        panels: as in `plot_patches`, from top to bottom.
        color_by: as in `plot_patches`.
        titles: one for each image.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: as `plot_patches`.
    """
    read, names = _checked(model, images, titles, panels, color_by)
    budgets = _budgets(model, num_patches)
    rows: list[list[Cell]] = []
    for image, name in zip(read, names, strict=True):
        views = [view_patches(model, image, budget, color_by == 'attention') for budget in budgets]
        for n, panel in enumerate(panels):
            heads = [counted_patches(view) if n == 0 else PANELS[panel] for view in views]
            heads[0] = '\n'.join([*(printable(name) if n == 0 else []), heads[0]])
            rows.append([(view, panel, head) for view, head in zip(views, heads, strict=True)])
    return draw_figure(rows)


def animate(
    model: APViT,
    images: 'AnyImage | Sequence[AnyImage]',
    num_patches: Sequence[NumPatches] | None = None,
    *,
    panels: Sequence[str] = ('outlines', 'adaptive'),
    color_by: str = 'order',
    titles: Sequence[str] | None = None,
    seconds: float = 1.0,
) -> bytes:
    """Make a GIF of what a model sees of images, a frame for each of several numbers of patches.

    Args:
        model: as in `plot_patches`.
        images: as in `plot_patches`.
        num_patches: of each frame; None: as in `compare`.
        panels: as in `plot_patches`.
        color_by: as in `plot_patches`.
        titles: one for each image.
        seconds: that a frame stays.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: as `plot_patches`.
    """
    read, names = _checked(model, images, titles, panels, color_by)
    frames = [('', model, budget) for budget in _budgets(model, num_patches)]
    return _film(frames, read, names, panels, color_by, seconds)


def animate_training(
    models: Iterable[tuple[str, APViT]],
    images: 'AnyImage | Sequence[AnyImage]',
    num_patches: NumPatches | None = None,
    *,
    panels: Sequence[str] = ('outlines', 'adaptive'),
    color_by: str = 'order',
    titles: Sequence[str] | None = None,
    seconds: float = 0.5,
) -> bytes:
    """Make a GIF of how patches came to lie where they do, a frame for each of several models.

    Args:
        models: with a name each, such as the snapshots of a training; taken one by one, so that they may be loaded
            when it is their turn. The images are read for the first.
        images: as in `plot_patches`.
        num_patches: N or ``(gh, gw)``; None: those of each model.
        panels: as in `plot_patches`.
        color_by: as in `plot_patches`.
        titles: one for each image.
        seconds: that a frame stays.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: as `plot_patches`; there is no model.
    """
    following = iter(models)
    first = next(following, None)
    if first is None:
        raise ValueError('expected one model or more, got none')
    read, names = _checked(first[1], images, titles, panels, color_by)
    frames = ((name, model, num_patches) for name, model in chain([first], following))
    return _film(frames, read, names, panels, color_by, seconds)


def _film(
    frames: Iterable[tuple[str, APViT, NumPatches | None]],
    images: Sequence[Tensor],
    names: Sequence[str],
    panels: Sequence[str],
    color_by: str,
    seconds: float,
) -> bytes:
    """Make a GIF of images: of each frame what it is called, the model and the number of patches."""
    if not SHORTEST <= seconds <= LONGEST:
        raise ValueError(f'expected seconds between {SHORTEST} and {LONGEST}, as a GIF can have, got {seconds}')
    drawing = load_drawing()
    called, seen = [], []
    for caption, model, budget in frames:
        called.append([', '.join(filter(None, (caption, name))) for name in names])
        seen.append([view_patches(model, image, budget, color_by == 'attention') for image in images])
    pages = [
        [panel_cells(view, title, panels) for view, title in zip(views, titles, strict=True)]
        for titles, views in zip(called, seen, strict=True)
    ]
    scales = common_scales(cell for rows in pages for row in rows for cell in row)
    pictures = [drawing.rendered(draw_figure(rows, scales), dpi=100) for rows in pages]
    file: bytes = drawing.gif_bytes(pictures, seconds)
    return file


def default_budgets(model: APViT) -> list[NumPatches]:
    """A sixteenth, a quarter, half (unless they crowd) and all of the patches of a model, as far as these differ."""
    own: int = model.num_patches
    budgets: list[NumPatches] = [n for n in dict.fromkeys((own // 16, own // 4, own // 2)) if 1 <= n < own]
    if crowds(model):
        grid = model.patch_embed.patching.layout.grids[0].grid  # of which the nearest even ones are taken
        fewer = dict.fromkeys(tuple(2 * max(1, round(side / (2 * n))) for side in grid) for n in (4, 2))
        budgets = [each for each in fewer if each[0] * each[1] < own]
    return [*budgets, model.patch_embed.own_budget]


def read_images(model: APViT, images: Any, longest: int | None = None) -> list[Tensor]:
    """Read one image or several for a model: each ``(C, H, W)`` in [0, 1].

    Raises:
        FileNotFoundError, ValueError: as `timm_apvit.pictures.images.read_image`; there is no image, or the model is
            no APViT.
    """
    check_apvit(model)
    several = isinstance(images, Sequence) and not isinstance(images, str | os.PathLike)
    if isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        several = True
    read = [
        read_image(image, model.patch_embed.patching.in_chans, longest) for image in (images if several else [images])
    ]
    if not read:
        raise ValueError('expected one image or more, got none')
    return read


def _checked(
    model: APViT, images: Any, titles: Sequence[str] | None, panels: Sequence[str], color_by: str
) -> tuple[list[Tensor], list[str]]:
    """Check arguments; read the images, and give each a name."""
    if isinstance(panels, str) or not panels or not set(panels) <= set(PANELS):
        raise ValueError(f'expected panels among {", ".join(PANELS)}, got {panels!r}')
    if color_by not in COLOURED_BY:
        raise ValueError(f'expected color_by to be one of {", ".join(COLOURED_BY)}, got {color_by!r}')
    read = read_images(model, images)
    names = [''] * len(read) if titles is None else [titles] if isinstance(titles, str) else list(titles)
    if len(names) != len(read):
        raise ValueError(f'expected {len(read)} titles, got {names!r:.80}')
    return read, names


def _budgets(model: APViT, num_patches: Sequence[NumPatches] | None) -> list[NumPatches]:
    if num_patches is None:
        return default_budgets(model)
    if isinstance(num_patches, str) or not isinstance(num_patches, Iterable):
        raise ValueError(f'expected a list of numbers of patches, such as [16, 49], got {num_patches!r}')
    budgets = list(num_patches)
    if not budgets:
        raise ValueError('expected one number of patches or more, got none')
    return budgets

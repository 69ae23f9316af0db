"""The frame of coordinates: cell centres and anchors.

Convention:
    Points are ``(x, y)``, sizes are ``(h, w)``. Normalised coordinates run over [-1, 1] from pixel *edge* to pixel edge
    (``align_corners=False``), so that centre ``j`` of ``n`` equal cells is ``(2j + 1) / n - 1``. The same holds within a
    patch. Everything is float32, whatever the dtype of the model: a bfloat16 coordinate is off by a pixel.
"""

import math
import operator
from collections.abc import Sequence
from typing import Optional, Tuple, Union  # noqa: UP035  TorchScript reads typing.Tuple on every supported torch.

import torch
from torch import Tensor

NumPatches = Union[int, Sequence[int]]


def cell_centres(index: Tensor, count: Tensor) -> Tensor:
    """Centre of cell ``index`` among ``count`` equal cells of [-1, 1]; the shapes broadcast."""
    return (2 * index + 1) / count - 1


def sample_grid(patch_size: Tuple[int, int], device: torch.device) -> Tensor:  # noqa: UP006
    """Patch-local sample positions of a patch of ``(P_h, P_w)`` pixels: ``(P_h, P_w, 2)``, float32."""
    rows = torch.arange(patch_size[0], device=device, dtype=torch.float32)
    columns = torch.arange(patch_size[1], device=device, dtype=torch.float32)
    y = cell_centres(rows, torch.full_like(rows, patch_size[0]))
    x = cell_centres(columns, torch.full_like(columns, patch_size[1]))
    return torch.stack([x[None, :].expand(patch_size), y[:, None].expand(patch_size)], dim=-1)


def anchors(layout: Tuple[int, int], device: torch.device) -> Tuple[Tensor, Tensor]:  # noqa: UP006
    """Centres and half-extents of the anchors of a layout: ``((N, 2), (N, 2))``, float32.

    ``layout`` is ``(N, R)``: N anchors in R rows of equal height, row r cut into ``(r+1)*N//R - r*N//R`` equal columns. So
    the anchors tile the image whatever N, primes included, and a ``(gh, gw)`` grid is the layout ``(gh * gw, gh)``.
    """
    num, rows = layout
    index = torch.arange(num, device=device)
    # Row r starts at anchor floor(r*N/R), so anchor n lies in the last row r with r*N < (n+1)*R.
    row = torch.div((index + 1) * rows - 1, num, rounding_mode='floor')
    start = torch.div(row * num, rows, rounding_mode='floor')
    columns = (torch.div((row + 1) * num, rows, rounding_mode='floor') - start).float()
    rows_f = torch.full_like(columns, rows)
    centres = torch.stack([cell_centres((index - start).float(), columns), cell_centres(row.float(), rows_f)], dim=-1)
    extents = torch.stack([1 / columns, 1 / rows_f], dim=-1)
    return centres, extents


def resolve_layout(num_patches: NumPatches, base_grid: tuple[int, int]) -> tuple[int, int]:
    """The layout ``(N, R)`` of a number of patches, given the grid whose aspect it should have.

    Args:
        num_patches: N, or ``(gh, gw)``. For the N of ``base_grid`` the layout is that grid; otherwise there are
            ``R = round(sqrt(N * gh / gw))`` rows, at least 1 and at most N.
        base_grid: ``(gh, gw)``.

    Raises:
        ValueError: ``num_patches`` is neither an integer >= 1 nor two of them.
    """
    wanted = check_num_patches(num_patches)
    if not isinstance(wanted, int):
        return wanted[0] * wanted[1], wanted[0]
    if wanted == base_grid[0] * base_grid[1]:
        return wanted, base_grid[0]
    return wanted, max(1, min(wanted, round(math.sqrt(wanted * base_grid[0] / base_grid[1]))))


def check_num_patches(num_patches: Optional[NumPatches]) -> Union[int, tuple[int, int]]:
    """Return ``num_patches`` as an int or a tuple ``(gh, gw)`` of ints.

    Raises:
        ValueError: it is neither an integer >= 1 nor two of them.
    """
    is_grid = isinstance(num_patches, Sequence) and not isinstance(num_patches, str)
    try:
        sizes = [num for num in num_patches] if is_grid else [num_patches]  # type: ignore[union-attr]  # noqa: C416
        if any(isinstance(size, bool) for size in sizes):
            raise TypeError
        counts = [operator.index(size) for size in sizes]  # type: ignore[arg-type]
    except TypeError:
        counts = []
    if min(counts, default=0) < 1 or (is_grid and len(counts) != 2):
        raise ValueError(f'expected num_patches to be an integer >= 1 or (gh, gw) with both >= 1, got {num_patches!r}')
    return (counts[0], counts[1]) if is_grid else counts[0]

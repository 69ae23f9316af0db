"""The frame of coordinates: cell centres and anchors.

Convention:
    Points are ``(x, y)``, sizes are ``(h, w)``. Normalised coordinates run over [-1, 1] from pixel *edge* to pixel edge
    (``align_corners=False``), so that centre ``j`` of ``n`` equal cells is ``(2j + 1) / n - 1``. The same holds
    within a patch. Everything is float32, whatever the dtype of the model: a bfloat16 coordinate is off by a pixel.
"""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, Union

import torch
from torch import Tensor

NumPatches = Union[int, Sequence[int]]


def cell_centres(index: Tensor, count: Tensor) -> Tensor:
    """Centre of cell ``index`` among ``count`` equal cells of [-1, 1]; the shapes broadcast."""
    return (2 * index + 1) / count - 1


def cell_index(coordinate: Tensor, count: int) -> Tensor:
    """Inverse of `cell_centres`: the fractional index of a normalised coordinate among ``count`` cells; any shape."""
    return (coordinate + 1) * (count / 2) - 0.5


def sample_grid(patch_size: tuple[int, int], device: torch.device) -> Tensor:
    """Patch-local sample positions of a patch of ``(P_h, P_w)`` pixels: ``(P_h, P_w, 2)``, float32."""
    rows = torch.arange(patch_size[0], device=device, dtype=torch.float32)
    columns = torch.arange(patch_size[1], device=device, dtype=torch.float32)
    y = cell_centres(rows, torch.full_like(rows, patch_size[0]))
    x = cell_centres(columns, torch.full_like(columns, patch_size[1]))
    return torch.stack([x[None, :].expand(patch_size), y[:, None].expand(patch_size)], dim=-1)


def anchors(layout: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres and half-extents of the anchors of a layout: ``((N, 2), (N, 2))``, float32.

    ``layout`` is ``(N, R)``: N anchors in R rows of equal height, row r cut into ``(r+1)*N//R - r*N//R`` equal
    columns. So the anchors tile the image whatever N, primes included, and a ``(gh, gw)`` grid is the layout ``(gh *
    gw, gh)``.
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


def layout_grid(layout: tuple[int, int]) -> tuple[int, int]:
    """The grid ``(gh, gw)`` nearest to a layout ``(N, R)``; the same one if the layout is a grid."""
    num, rows = layout
    return rows, (2 * num + rows) // (2 * rows)


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


def check_num_patches(num_patches: NumPatches) -> Union[int, tuple[int, int]]:
    """Return ``num_patches`` as an int or a tuple ``(gh, gw)`` of ints.

    Raises:
        ValueError: it is neither an integer >= 1 nor two of them.
    """
    return _check_counts('num_patches', 'gh, gw', num_patches)


def check_patch_size(patch_size: Union[int, Sequence[int]]) -> tuple[int, int]:
    """Return ``patch_size`` as ``(P_h, P_w)``.

    Raises:
        ValueError: it is neither an integer >= 1 nor two of them.
    """
    sizes = _check_counts('patch_size', 'P_h, P_w', patch_size)
    return (sizes, sizes) if isinstance(sizes, int) else sizes


def check_number(name: str, value: float, low: float, high: float = math.inf) -> float:
    """Return a finite number within [``low``, ``high``] as a float.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high or value == math.inf:
        raise ValueError(f'expected {name} to be a finite number within [{low}, {high}], got {value!r}')
    return float(value)


def _check_counts(name: str, pair: str, given: Any) -> Union[int, tuple[int, int]]:
    is_pair = isinstance(given, Sequence) and not isinstance(given, str)
    values = list(given) if is_pair else [given]
    try:
        counts = [operator.index(value) for value in values if not isinstance(value, bool)]
    except TypeError:
        counts = []
    if len(counts) != (2 if is_pair else 1) or min(counts) < 1:
        raise ValueError(f'expected {name} to be an integer >= 1 or ({pair}) with both >= 1, got {given!r}')
    return (counts[0], counts[1]) if is_pair else counts[0]

"""The frame of coordinates, and checks of numbers.

Convention:
    Points are ``(x, y)``, sizes are ``(h, w)``. Normalised coordinates run over [-1, 1] from pixel *edge* to pixel edge
    (``align_corners=False``), so that centre ``j`` of ``n`` equal cells is ``(2j + 1) / n - 1``. The same holds
    within a patch. Everything is float32, whatever the dtype of the model: a bfloat16 coordinate is off by a pixel.
"""

import math
import numbers
import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.amp import is_autocast_available


def in_float32(device: torch.device) -> AbstractContextManager[Any]:
    """Compute as the tensors' dtypes say, whatever autocast surrounds it."""
    if is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def cell_centres(index: Tensor, count: Tensor | int) -> Tensor:
    """Centre of cell ``index`` among ``count`` equal cells of [-1, 1]; the shapes broadcast."""
    return (2 * index + 1) / count - 1


def cell_index(coordinate: Tensor, count: int) -> Tensor:
    """Inverse of `cell_centres`: the fractional index of a normalised coordinate among ``count`` cells; any shape."""
    return (coordinate + 1) * (count / 2) - 0.5


def vector_on(values: Sequence[float], device: torch.device) -> Tensor:
    """Some numbers as a tensor, float32, made on the device: a copy would stop a GPU, and a CUDA graph forbids it."""
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])


def sample_grid(patch_size: tuple[int, int], device: torch.device) -> Tensor:
    """Patch-local sample positions of a patch of ``(P_h, P_w)`` pixels: ``(P_h, P_w, 2)``, float32."""
    rows = torch.arange(patch_size[0], device=device, dtype=torch.float32)
    columns = torch.arange(patch_size[1], device=device, dtype=torch.float32)
    y = cell_centres(rows, torch.full_like(rows, patch_size[0]))
    x = cell_centres(columns, torch.full_like(columns, patch_size[1]))
    return torch.stack([x[None, :].expand(patch_size), y[:, None].expand(patch_size)], dim=-1)


def check_patch_size(patch_size: int | Sequence[int]) -> tuple[int, int]:
    """Return ``patch_size`` as ``(P_h, P_w)``; ValueError if it is neither an integer >= 1 nor two of them."""
    sizes = check_counts('patch_size', 'P_h, P_w', patch_size)
    return (sizes, sizes) if isinstance(sizes, int) else sizes


def check_number(name: str, value: float, low: float, high: float = math.inf) -> float:
    """Return a finite number within [``low``, ``high``] as a float.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high or value == math.inf:
        raise ValueError(f'expected {name} to be a finite number within [{low}, {high}], got {value!r}')
    return float(value)


def check_shape(name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor; ValueError unless it is one of this shape."""
    if not isinstance(value, Tensor) or value.shape != shape:
        got = f'shape {list(value.shape)}' if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f'expected {name} to be a tensor of shape {list(shape)}, got {got}')
    return value


def check_count(name: str, value: Any, most: int | None = None) -> int:
    """Return an integer from 1 to ``most``; ValueError names the argument if it is none."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1 or (most is not None and count > most):
        bounds = '>= 1' if most is None else f'from 1 to {most}'
        raise ValueError(f'expected {name} to be an integer {bounds}, got {value!r}')
    return count


def check_multiple(name: str, value: Any, divisor: int) -> int:
    """Return an integer of 1, 2, ... times a divisor; ValueError names the argument if it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < divisor or value % divisor:
        raise ValueError(f'expected {name} to be a multiple of {divisor}, got {value!r}')
    return value


def about_square(cells: float, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of cells about square over an image ``(H, W)``: about as many as ``cells`` squared."""
    root = math.sqrt(int(image_size[0]) / int(image_size[1]))  # while torch traces, they are tensors
    most = max(1, round(cells**2))  # of an image that is a line
    rows, columns = (min(most, max(1, round(each))) for each in (cells * root, cells / root))
    return rows, columns


def check_counts(name: str, pair: str, given: Any) -> int | tuple[int, int]:
    """Return a count, or a pair of them, as an int or a tuple of ints; ValueError names the argument and its pair."""
    is_pair = isinstance(given, Sequence) and not isinstance(given, str)
    values = list(given) if is_pair else [given]
    try:
        counts = [operator.index(value) for value in values if not isinstance(value, bool)]
    except TypeError:
        counts = []
    if len(counts) != (2 if is_pair else 1) or min(counts) < 1:
        raise ValueError(f'expected {name} to be an integer >= 1 or ({pair}) with both >= 1, got {given!r}')
    return (counts[0], counts[1]) if is_pair else counts[0]

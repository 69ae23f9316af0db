"""Reading and resizing maps; without atomic additions where PyTorch is to be deterministic.

On CUDA the backward passes of ``F.grid_sample`` (even where its positions alone need a gradient) and of an anti-aliased
``F.interpolate`` add atomically, in any order, and ``torch.use_deterministic_algorithms(True)`` refuses both. In that
mode the same numbers come from indexing and from matrix products, whose backward passes are deterministic: on every
device, so that a CPU tests what a GPU runs. It takes longer, and more memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_apvit.patching.coords import cell_index
from timm_apvit.patching.warps import exact_product


def grid_sample(texture: Tensor, grid: Tensor, padding_mode: str = 'border') -> Tensor:
    """Read a texture bilinearly: ``(B, C, h, w)``, ``(B, R, S, 2)`` -> ``(B, C, R, S)``.

    Args:
        texture: of the dtype of ``grid``.
        grid: (x, y), normalised over pixel edges.
        padding_mode: ``'border'``: beyond the texture its border pixels go on; ``'zeros'``: there is nothing.
    """
    if torch.are_deterministic_algorithms_enabled():
        return indexed_grid_sample(texture, grid, padding_mode)
    return F.grid_sample(texture, grid, mode='bilinear', padding_mode=padding_mode, align_corners=False)


def indexed_grid_sample(texture: Tensor, grid: Tensor, padding_mode: str) -> Tensor:
    """What `grid_sample` gives, values and gradients, by indexing; a position that is not a number gives none."""
    batch, channels, height, width = texture.shape
    x, y = cell_index(grid[..., 0], width), cell_index(grid[..., 1], height)
    if padding_mode == 'border':
        x, y = _held(x, width), _held(y, height)
    pixels = texture.permute(0, 2, 3, 1).reshape(-1, channels)  # (B * h * w, C)
    first = torch.arange(batch, device=texture.device).reshape(-1, 1, 1) * (height * width)
    left, top = x.detach().floor(), y.detach().floor()
    terms = []
    for row, share_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, share_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = first + _index(row, height) * width + _index(column, width)
            terms.append(pixels[index] * (share_y * share_x * inside).unsqueeze(-1))
    return (terms[0] + terms[1] + terms[2] + terms[3]).permute(0, 3, 1, 2)


def resize(image: Tensor, size: list[int], mode: str) -> Tensor:
    """Resize ``(B, C, H, W)``, anti-aliased, to ``size`` (h, w); ``mode`` is ``'bilinear'`` or ``'bicubic'``."""
    refused = image.requires_grad and torch.are_deterministic_algorithms_enabled()
    # PyTorch's former exporter to ONNX, which traces, knows nothing of anti-aliasing.
    if refused or torch.onnx.is_in_onnx_export():
        return multiplied_resize(image, size, mode)
    return F.interpolate(image, size=size, mode=mode, antialias=True)


def multiplied_resize(image: Tensor, size: list[int], mode: str) -> Tensor:
    """What `resize` gives, by a matrix product along each axis."""
    rows, columns = (_resizing(image, axis, size[axis], mode) for axis in (0, 1))
    return exact_product(exact_product(rows, image), columns.T)


def _resizing(image: Tensor, axis: int, length: int, mode: str) -> Tensor:
    """The matrix that resizes an axis of n pixels to a length: ``(length, n)``; each row sums to 1."""
    pixels = image.shape[2 + axis]
    stretch = pixels / length
    centres = (torch.arange(length, device=image.device, dtype=image.dtype) + 0.5) * stretch
    distance = torch.arange(pixels, device=image.device, dtype=image.dtype) + 0.5 - centres[:, None]
    distance = distance.abs() / max(stretch, 1.0)
    if mode == 'bilinear':
        weights = (1 - distance).clamp(min=0)
    else:  # Keys 1981, with a = -0.5, as Pillow has it
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, far) * (distance < 2)
    return weights / weights.sum(dim=1, keepdim=True)


def _held(position: Tensor, count: int) -> Tensor:
    """Positions among ``count`` cells, held at the outer cells' centres, where they have no gradient; any shape."""
    within = (position > 0) & (position < count - 1)
    return torch.where(within, position, position.detach().clamp(0.0, float(count - 1)))


def _index(cell: Tensor, count: int) -> Tensor:
    """The nearest of ``count`` cells to a whole number; any shape."""
    return torch.nan_to_num(cell).clamp(0.0, float(count - 1)).long()

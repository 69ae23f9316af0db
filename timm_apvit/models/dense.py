"""Dense maps: tokens at free positions -> an aligned feature map."""

import torch
from torch import Tensor

from timm_apvit.patching.anchors import Rows
from timm_apvit.patching.geometry import PatchGeometry


def splat_weights(geometry: PatchGeometry, grid_size: tuple[int, int]) -> Tensor:
    """Share of each patch in each cell of a grid: ``(B, h * w, N)``; the shares of a cell sum to 1.

    A cell is the average of the patches that cover it, weighted by the area of their overlap (measured in the patch's
    own frame, where a rotated cell is taken as its bounding box). A cell that no patch covers takes the nearest
    patches. A warp is left out: each patch counts as the parallelogram that it would be without.
    """
    cell_centres, cell_extents, _ = Rows(grid_size[0] * grid_size[1], grid_size[0]).anchors(geometry.centres.device)
    offset = cell_centres[:, None] - geometry.centres[:, None]  # (B, h * w, N, 2)
    matrices = geometry.image_from_patch
    xx, xy, yx, yy = matrices[..., 0, 0], matrices[..., 0, 1], matrices[..., 1, 0], matrices[..., 1, 1]
    area = xx * yy - xy * yx
    inverse = (torch.stack([yy, -xy, -yx, xx], dim=-1) / area.unsqueeze(-1)).reshape(matrices.shape)[:, None]
    local = inverse[..., 0] * offset[..., :1] + inverse[..., 1] * offset[..., 1:]
    half = (inverse.abs() * cell_extents[:1, None, None, None, :]).sum(dim=-1)
    overlap = (torch.minimum(local + half, torch.ones_like(local)) - (local - half).clamp(min=-1.0)).clamp(min=0.0)
    covered = (overlap / (2 * half)).prod(dim=-1)  # share of the cell

    uncovered = 1e-6  # weight of the nearest patches: nothing where a cell is covered, all where it is not
    nearest = torch.softmax(-((offset / cell_extents[:1, None]) ** 2).sum(dim=-1), dim=-1)
    weights = covered + uncovered * nearest
    return weights / weights.sum(dim=-1, keepdim=True)


def dense_map(tokens: Tensor, weights: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Put tokens back where they looked: ``(B, N, D)``, ``(B, h * w, N)`` -> ``(B, D, h, w)``."""
    maps = weights.to(tokens.dtype) @ tokens
    return maps.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], grid_size[0], grid_size[1])

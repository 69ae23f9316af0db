"""Dense maps: tokens at free positions -> an aligned feature map.

A cell of the map is the average of the patches that cover it, weighted by the area of their overlap and by how densely
a patch samples its part of the image: what a small patch saw in detail is not lost in the large one around it. Where
patches are much larger than cells their edges are soft, as those of an interpolated grid.

A patch touches few cells, so pairs of a patch and a cell are listed rather than all ``N * h * w`` of them. How many
there are depends on the data: where shapes must not, under a compiler or a tracer, each pair counts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_apvit.patching.coords import cell_centres, cell_index, in_float32, vector_on
from timm_apvit.patching.geometry import PatchGeometry

# In cells: less than that of a patch beyond a cell's edge is rounding.
SLIVER = 1e-4
# In half-extents of a patch: cells smaller than that weigh as if they were as large, which makes its edges soft.
SOFT = 0.5
# Cells without a patch whose nearest one is sought at a time.
CHUNK = 1024


class Overlaps(NamedTuple):
    """Which patch covers which cell of a grid, or nearly does.

    Attributes:
        patch: of pair m, in ``B * N``: ``(M,)``.
        cell: in ``B * h * w``: ``(M,)``.
        share: of the cell's area that the patch covers, ``(M,)``.
        weight: of the patch in the cell, up to the sum of the cell's, ``(M,)``.
    """

    patch: Tensor
    cell: Tensor
    share: Tensor
    weight: Tensor


class SplatWeights(NamedTuple):
    """Weights by which a map averages tokens; those of a cell sum to 1.

    Attributes:
        weight: of each pair of a patch and a cell, cell after cell, ``(M,)``; where ``patch`` is None: of all of them,
            ``(B, h * w, N)``.
        coverage: share of each cell that patches cover, each for itself and at most all of it, ``(B, h, w)``.
        num_patches: N.
        patch: as in `Overlaps`.
        starts: index of each cell's first pair, ``(B * h * w,)``.
    """

    weight: Tensor
    coverage: Tensor
    num_patches: int
    patch: Tensor | None = None
    starts: Tensor | None = None


def splat_weights(geometry: PatchGeometry, grid_size: tuple[int, int]) -> SplatWeights:
    """Weights of the patches in the cells of a grid ``(h, w)``; a cell that no patch comes near takes the nearest.

    Overlaps are measured in a patch's own frame, where a rotated cell is taken as its bounding box. A warp is left out:
    each patch counts as the parallelogram that it would be without.
    """
    height, width = grid_size
    batch, num = geometry.centres.shape[:2]
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    if tracing or geometry.centres.is_meta:
        return _all_weights(geometry, grid_size)
    pairs = overlaps(geometry, grid_size)
    nothing = pairs.share.new_zeros(batch * height * width)
    total = nothing.index_add(0, pairs.cell, pairs.weight)
    holes = (total == 0).nonzero().squeeze(1)
    image = torch.div(holes, height * width, rounding_mode='floor')
    parts = [slice(start, start + CHUNK) for start in range(0, len(holes), CHUNK)]
    nearest = [_nearest(geometry.centres[image[part]], grid_size, holes[part] % (height * width)) for part in parts]
    patch = torch.cat([pairs.patch, image * num + torch.cat([*nearest, holes[:0]])])
    weight = torch.cat([pairs.weight / total[pairs.cell], total.new_ones(len(holes))])
    cells, order = torch.cat([pairs.cell, holes]).sort(stable=True)
    starts = torch.searchsorted(cells, torch.arange(len(nothing), device=cells.device))
    coverage = nothing.index_add(0, pairs.cell, pairs.share).clamp(max=1).reshape(batch, height, width)
    return SplatWeights(weight[order], coverage, num, patch[order], starts)


def quarters(geometry: PatchGeometry) -> PatchGeometry:
    """Where the quarters of each patch lie, row by row in its own frame: four patches without a warp for each one."""
    places = torch.arange(-1.0, 2.0, device=geometry.centres.device)
    corners = geometry.points(torch.stack(torch.meshgrid(places, places, indexing='xy'), dim=-1))  # (B, N, 3, 3, 2)
    top, bottom = corners[:, :, :-1], corners[:, :, 1:]
    # The parallelogram nearest to its four corners, which a warp moves.
    across = bottom[:, :, :, 1:] - bottom[:, :, :, :-1] + top[:, :, :, 1:] - top[:, :, :, :-1]
    down = bottom[:, :, :, 1:] - top[:, :, :, 1:] + bottom[:, :, :, :-1] - top[:, :, :, :-1]
    middle = bottom[:, :, :, 1:] + bottom[:, :, :, :-1] + top[:, :, :, 1:] + top[:, :, :, :-1]
    return PatchGeometry(
        centres=middle.flatten(1, 3) / 4,
        extents=(geometry.extents / 2).repeat_interleave(4, dim=1),
        rotation=geometry.rotation.repeat_interleave(4, dim=1),
        shear=geometry.shear.repeat_interleave(4, dim=1),
        image_from_patch=torch.stack([across, down], dim=-1).flatten(1, 3) / 4,
    )


def dense_map(tokens: Tensor, weights: SplatWeights, grid_size: tuple[int, int]) -> Tensor:
    """Put tokens ``(B, N, D)`` back where they looked: ``(B, D, h, w)``.

    Raises:
        ValueError: as `check_all_there`.
    """
    batch, num, dim = tokens.shape
    check_all_there(num, weights.num_patches)
    weight = weights.weight.to(tokens.dtype)
    if weights.patch is None:
        with in_float32(tokens.device):
            maps = weight @ tokens
    else:
        maps = F.embedding_bag(
            weights.patch, tokens.flatten(0, 1), weights.starts, mode='sum', per_sample_weights=weight
        )
    return maps.reshape(batch, grid_size[0], grid_size[1], dim).permute(0, 3, 1, 2)


def check_all_there(tokens: int, patches: int) -> None:
    """Raise ValueError unless there are as many tokens as patches, of which a model may drop some."""
    if tokens != patches:
        raise ValueError(
            f'expected the tokens of all {patches} patches for a map, got {tokens}: set patch_drop_rate=0, or eval mode'
        )


def overlaps(geometry: PatchGeometry, grid_size: tuple[int, int]) -> Overlaps:
    """All pairs of a patch and a cell of a grid ``(h, w)`` in which it has a weight, be the share 0 or not."""
    first, end = (each.flatten(0, 1) for each in _touched(geometry, grid_size))
    across, down = (end - first).unbind(-1)
    counts = across * down
    patch = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    place = torch.arange(len(patch), device=counts.device) - (counts.cumsum(0) - counts)[patch]
    column = first[patch, 0] + place % across[patch]
    row = first[patch, 1] + torch.div(place, across[patch], rounding_mode='floor')
    centres, matrices = geometry.centres.flatten(0, 1)[patch], geometry.image_from_patch.flatten(0, 1)[patch]
    share, weight = _shares(centres, matrices, grid_size, column, row)
    image = torch.div(patch, max(1, geometry.centres.shape[1]), rounding_mode='floor')
    cell = (image * grid_size[0] + row) * grid_size[1] + column
    found = (weight > 0).nonzero().squeeze(1)  # of a turned patch, not all that its bounding box touches
    return Overlaps(patch[found], cell[found], share[found], weight[found])


def _shares(
    centres: Tensor, matrices: Tensor, grid_size: tuple[int, int], column: Tensor, row: Tensor
) -> tuple[Tensor, Tensor]:
    """Share of the area of cells of a grid that patches cover, and their weights.

    Patches by centre ``(..., 2)`` and matrix ``(..., 2, 2)``, cells by column and row ``(...)``; the shapes broadcast.
    """
    x = cell_centres(column, grid_size[1]) - centres[..., 0]
    y = cell_centres(row, grid_size[0]) - centres[..., 1]
    area, inverse = _area_and_inverse(matrices)
    share, weight = torch.ones_like(area), 1 / area
    for axis in range(2):
        along_x, along_y = inverse[..., axis, 0], inverse[..., axis, 1]
        local = along_x * x + along_y * y
        half = along_x.abs() / grid_size[1] + along_y.abs() / grid_size[0]  # of the cell's bounding box
        share, weight = share * _overlap(local, half), weight * _overlap(local, half.clamp(min=SOFT))
    return share, weight


def _overlap(local: Tensor, half: Tensor) -> Tensor:
    """Share of intervals of a half-length about a place that lies within [-1, 1]; the shapes broadcast."""
    return ((local + half).clamp(max=1.0) - (local - half).clamp(min=-1.0)).clamp(min=0.0) / (2 * half)


def _area_and_inverse(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Determinants ``(B, N)`` and inverses of matrices ``(B, N, 2, 2)``."""
    xx, xy, yx, yy = matrices[..., 0, 0], matrices[..., 0, 1], matrices[..., 1, 0], matrices[..., 1, 1]
    area = xx * yy - xy * yx
    adjugate = torch.stack([yy, -xy, -yx, xx], dim=-1).reshape(matrices.shape)
    return area, adjugate / area.unsqueeze(-1).unsqueeze(-1)


def _all_weights(geometry: PatchGeometry, grid_size: tuple[int, int]) -> SplatWeights:
    """The same weights, of each pair: shapes do not depend on the data."""
    (height, width), device = grid_size, geometry.centres.device
    cells = torch.arange(height * width, device=device).unsqueeze(1)
    column, row = cells % width, torch.div(cells, width, rounding_mode='floor')  # (h * w, 1)
    first, end = (each.unsqueeze(1) for each in _touched(geometry, grid_size))
    inside = (column >= first[..., 0]) & (column < end[..., 0]) & (row >= first[..., 1]) & (row < end[..., 1])
    centres, matrices = geometry.centres.unsqueeze(1), geometry.image_from_patch.unsqueeze(1)
    share, weight = (each * inside for each in _shares(centres, matrices, grid_size, column, row))  # (B, h * w, N)
    total = weight.sum(dim=-1, keepdim=True)
    nearest = F.one_hot(_nearest(geometry.centres.unsqueeze(1), grid_size, cells.squeeze(1)), weight.shape[-1])
    weight = torch.where(total > 0, weight / total.clamp(min=1e-30), nearest.to(weight.dtype))
    return SplatWeights(weight, share.sum(dim=-1).clamp(max=1).reshape(-1, height, width), weight.shape[-1])


def _touched(geometry: PatchGeometry, grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """First column and row of the grid that each patch touches, and the ones after its last: ``(B, N, 2)`` each."""
    with torch.no_grad():
        size = vector_on((grid_size[1], grid_size[0]), geometry.centres.device)
        matrices = geometry.image_from_patch
        across = _area_and_inverse(matrices)[1].abs() / size
        soft = (SOFT - across.sum(dim=-1)).clamp(min=0.0)  # how much farther than itself a patch has a weight
        reach = (matrices.abs() * (1 + soft.unsqueeze(-2))).sum(dim=-1)
        first = torch.floor((geometry.centres - reach + 1) / 2 * size + SLIVER)
        end = torch.ceil((geometry.centres + reach + 1) / 2 * size - SLIVER)
        first = first.clamp(min=0).minimum(size - 1)
        return first.long(), torch.maximum(end.minimum(size), first + 1).long()


def _nearest(centres: Tensor, grid_size: tuple[int, int], cell: Tensor) -> Tensor:
    """Which of centres ``(..., cells | 1, N, 2)`` is nearest to each of some cells, distances in cells."""
    with torch.no_grad():
        (height, width), cell = grid_size, cell.unsqueeze(-1)
        x = cell_index(centres[..., 0], width) - cell % width
        y = cell_index(centres[..., 1], height) - torch.div(cell, width, rounding_mode='floor')
        return (x.square() + y.square()).argmin(dim=-1)

"""Position embeddings at free positions."""

import torch
from torch import Tensor

from timm_apvit.patching.anchors import Layout
from timm_apvit.patching.coords import cell_index
from timm_apvit.patching.deterministic import resize


def _neighbours(coordinate: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two cells about a normalised coordinate and the weight of the second; any shape."""
    cell = cell_index(coordinate, count).clamp(0.0, float(count - 1))
    low = cell.detach().floor()
    index = low.long().clamp(0, count - 1)  # again, for a coordinate that is not a number: its result is to say so
    return index, (index + 1).clamp(max=count - 1), cell - low


def resample_pos_embed(
    pos_embed: Tensor, grid_size: tuple[int, int], new_grid_size: tuple[int, int], num_prefix_tokens: int = 0
) -> Tensor:
    """Resample a position embedding to another grid: ``(1, T + gh * gw, D)`` -> ``(1, T + gh' * gw', D)``.

    Anti-aliased and bicubic, as timm has it; to be used before `interpolate_pos_embed` when the
    patches are much larger or smaller than a cell of ``grid_size``. Bilinear reading alone differs by 6 % RMS at twice
    the cell's side and by 29 % at four times. The same grid gives the embedding as it is.
    """
    if grid_size[0] == new_grid_size[0] and grid_size[1] == new_grid_size[1]:
        return pos_embed
    grid = pos_embed[:, num_prefix_tokens:].float().reshape(1, grid_size[0], grid_size[1], -1).permute(0, 3, 1, 2)
    grid = resize(grid, [new_grid_size[0], new_grid_size[1]], 'bicubic')
    resampled = grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :num_prefix_tokens], resampled], dim=1)


def interpolate_pos_embed(
    pos_embed: Tensor,
    centres: Tensor,
    grid_size: tuple[int, int],
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Read a position embedding at free positions: ``(1, T + gh * gw, D)``, ``(B, N, 2)`` -> ``(B, T + N, D)``.

    Bilinear at the centres, continued beyond the outer cell centres by their own value, and exact at every cell centre
    ``(2j + 1) / n - 1`` (``align_corners=False``), so that the cells of a fixed grid get the embeddings they always
    had. Differentiable in both. Standing alone: it works for any ViT.

    Args:
        pos_embed: learned embedding of T prefix tokens (class, registers) and a ``grid_size`` grid, row by row; any
            dtype.
        centres: (x, y), normalised over pixel edges.
        grid_size: ``(gh, gw)``.
        num_prefix_tokens: T; they come first and are returned as they are.

    Raises:
        ValueError: the number of embeddings is not ``T + gh * gw``.

    Example:
        >>> grid = torch.arange(4.0).reshape(1, 4, 1)  # 2 x 2 cells
        >>> interpolate_pos_embed(grid, torch.tensor([[[-0.5, -0.5], [0.0, 0.0]]]), (2, 2)).flatten().tolist()
        [0.0, 1.5]
    """
    num = num_prefix_tokens + grid_size[0] * grid_size[1]
    if pos_embed.dim() != 3 or pos_embed.shape[0] != 1 or pos_embed.shape[1] != num:
        raise ValueError(
            f'expected pos_embed of shape (1, {num}, D) for {num_prefix_tokens} prefix tokens and a '
            f'{grid_size[0]} x {grid_size[1]} grid, got {list(pos_embed.shape)}'
        )
    table = pos_embed[0, num_prefix_tokens:]
    if table.dtype != torch.float64:
        table = table.float()
    left, right, x = _neighbours(centres[..., 0].float(), grid_size[1])
    above, below, y = _neighbours(centres[..., 1].float(), grid_size[0])
    x, y = x.unsqueeze(-1).to(table.dtype), y.unsqueeze(-1).to(table.dtype)
    # Indexing rather than a product of hat weights: autocast would round the result to its own dtype.
    upper = torch.lerp(table[above * grid_size[1] + left], table[above * grid_size[1] + right], x)
    lower = torch.lerp(table[below * grid_size[1] + left], table[below * grid_size[1] + right], x)
    patches = torch.lerp(upper, lower, y).to(pos_embed.dtype)
    if num_prefix_tokens == 0:
        return patches
    return torch.cat([pos_embed[:, :num_prefix_tokens].expand(patches.shape[0], -1, -1), patches], dim=1)


def layout_pos_embed(
    pos_embed: Tensor, positions: Tensor, layout: Layout, grid_size: tuple[int, int], num_prefix_tokens: int = 0
) -> Tensor:
    """Read a position embedding at the patches of a layout: ``(1, T + gh * gw, D)`` -> ``(B, T + N, D)``.

    For each of its grids the embedding is resampled to that grid first; ``positions`` are the (x, y) of its patches,
    ``(B, N, 2)``, and the others as for `interpolate_pos_embed`.
    """
    parts: list[Tensor] = []
    counts = [each.num_patches for each in layout.grids]
    for rows, centres in zip(layout.grids, torch.split(positions, counts, dim=1), strict=True):
        table = resample_pos_embed(pos_embed, grid_size, rows.grid, num_prefix_tokens)
        read = interpolate_pos_embed(table, centres, rows.grid, num_prefix_tokens)
        parts.append(read[:, num_prefix_tokens:] if parts else read)
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

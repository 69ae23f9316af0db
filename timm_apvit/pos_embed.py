"""Position embeddings at free positions."""

import torch
from torch import Tensor


def _corners(coordinate: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two cells about a normalised coordinate and the weight of the second; any shape."""
    cell = ((coordinate + 1) * (count / 2) - 0.5).clamp(0.0, float(count - 1))
    low = cell.detach().floor()
    return low.long(), (low + 1).clamp(max=float(count - 1)).long(), cell - low


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
    left, right, x = _corners(centres[..., 0].float(), grid_size[1])
    above, below, y = _corners(centres[..., 1].float(), grid_size[0])
    x, y = x.unsqueeze(-1), y.unsqueeze(-1)
    # Indexing rather than a product of hat weights: autocast would round the result to its own dtype.
    upper = table[above * grid_size[1] + left] * (1 - x) + table[above * grid_size[1] + right] * x
    lower = table[below * grid_size[1] + left] * (1 - x) + table[below * grid_size[1] + right] * x
    patches = (upper * (1 - y) + lower * y).to(pos_embed.dtype)
    if num_prefix_tokens == 0:
        return patches
    return torch.cat([pos_embed[:, :num_prefix_tokens].expand(patches.shape[0], -1, -1), patches], dim=1)

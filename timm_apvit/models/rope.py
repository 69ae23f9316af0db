"""Rotary position embeddings at free positions, whatever the units, offsets and order of axes of timm's own."""

from typing import Any

import torch
from torch import Tensor

from timm_apvit.patching.coords import cell_index


def rope_at(rope: Any, positions: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Sine and cosine of a RoPE of timm at free positions.

    Every angle of timm's, axial or mixed, is affine in the position. So it is that of the nearest cell, from timm's own
    table, and a slope times the way from its centre, the slope read off two neighbouring cells: timm's at cell centres.
    Beyond the outer cell centres the angle goes on. An axial angle must turn by less than pi from cell to cell, as it
    does but for DINOv3's on 4 cells a side or fewer; a grid one cell wide has no slope along that axis.

    Args:
        rope: module of timm with ``get_embed``.
        positions: (x, y), normalised over pixel edges, ``(B, N, 2)``.
        grid_size: ``(gh, gw)`` of the table, whose cells are the units of positions.

    Returns:
        ``(B, N, 2 d)`` of an axial embedding, ``(B, depth, heads, N, 2 d)`` of a mixed one.
    """
    # One that knows its grid, which is that of the model's images, has the table.
    cached = getattr(rope, 'feat_shape', None) is not None
    table = rope.get_embed() if cached else rope.get_embed(shape=[grid_size[0], grid_size[1]])
    slopes = None
    if hasattr(rope, 'freqs') and not (rope.training and rope.aug_active):  # learned, and may turn by more than pi
        slopes = rope.freqs if rope.grid_indexing == 'xy' else rope.freqs.flip(0)
    return turned(table, slopes, positions, grid_size)


def turned(table: Tensor, slopes: Tensor | None, positions: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Turn the angles of the nearest cells to free positions, see `rope_at`; the table is ``(..., gh * gw, 2 d)``.

    Slopes, ``(2, ..., d / 2)`` along x and y, are read off the table if there are none.
    """
    gh, gw = grid_size
    columns, rows = cell_index(positions[..., 0].float(), gw), cell_index(positions[..., 1].float(), gh)
    column, row = columns.detach().round().clamp(0, gw - 1), rows.detach().round().clamp(0, gh - 1)
    nearest = torch.nan_to_num(row * gw + column).long()  # (B, N)
    sine, cosine = (each[..., nearest, :].movedim(-3, 0) for each in table.float().chunk(2, dim=-1))  # (B, ..., N, d)
    if slopes is None:
        cells = table.float().reshape(*table.shape[:-2], gh, gw, table.shape[-1])
        along_x, along_y = (_turn(cells, axis) for axis in (-2, -3))
    else:
        along_x, along_y = (each.unsqueeze(-2).repeat_interleave(2, dim=-1) for each in slopes.float())  # (..., 1, d)
    shape = [positions.shape[0], *[1] * (sine.dim() - 3), positions.shape[1], 1]
    turn = (columns - column).reshape(shape) * along_x + (rows - row).reshape(shape) * along_y
    sine_of, cosine_of = torch.sin(turn), torch.cos(turn)
    return torch.cat([sine * cosine_of + cosine * sine_of, cosine * cosine_of - sine * sine_of], dim=-1).to(table.dtype)


# FX takes it as a leaf: its control flow depends on shapes.
torch.fx.wrap('turned')


def _turn(cells: Tensor, axis: int) -> Tensor:
    """The angle from the first of some cells ``(..., gh, gw, 2 d)`` to the next one along an axis: ``(..., 1, d)``."""
    first = cells[..., :1, :1, :]
    following = cells.narrow(axis, min(1, cells.shape[axis] - 1), 1)[..., :1, :1, :]
    (sine, cosine), (next_sine, next_cosine) = first.chunk(2, dim=-1), following.chunk(2, dim=-1)
    return torch.atan2(next_sine * cosine - next_cosine * sine, next_cosine * cosine + next_sine * sine).squeeze(-3)

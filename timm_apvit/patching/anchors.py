"""Anchors: where patches start from, and the layouts that say how many there are and where.

A patch at its anchor is a cell of a fixed grid. `LAYOUTS` has the ways to lay anchors: N of them in rows, of which a
grid is a case, or a coarse grid and a fine one together; `register_layout` adds one of your own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_apvit.patching.coords import cell_centres, check_counts, check_number
from timm_apvit.patching.parts import Parts

# N, (gh, gw), or a layout by name: {'name': 'coarse_fine', 'coarse': 4, 'fine': [7, 7]}.
NumPatches = int | Sequence[int] | Mapping[str, Any]


class Anchors(NamedTuple):
    """Where patches start from.

    Convention:
        (x, y), normalised over pixel edges, as everywhere (`timm_apvit.patching.coords`).

    Attributes:
        centres: ``(N, 2)``, or ``(B, N, 2)`` where each image has its own.
        extents: half-extents, of the same shape.
        motion: how far each patch may move, as a share of the transform's bounds, ``(N, 1)``; None: 1 for all.
    """

    centres: Tensor
    extents: Tensor
    motion: Tensor | None = None

    def within(self, window: Tensor) -> 'Anchors':
        """The same anchors laid over windows ``(B, 3)``, centre (x, y) and half-extent, rather than over the image."""
        extent = window[:, None, 2:]
        return self._replace(centres=window[:, None, :2] + extent * self.centres, extents=extent * self.extents)


@dataclass(frozen=True)
class Rows:
    """N anchors in R rows of equal height, row r cut into ``(r+1)*N//R - r*N//R`` equal columns.

    So they tile the image whatever N, primes included, and a ``(gh, gw)`` grid is ``Rows(gh * gw, gh)``.

    Attributes:
        num_patches: N.
        rows: R, at least 1 and at most N.
        motion: share of the transform's bounds that their patches may use; 0: they stay where they are.
    """

    num_patches: int
    rows: int
    motion: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= self.num_patches:
            raise ValueError(f'expected 1 <= rows <= num_patches, got {self.rows} rows of {self.num_patches} patches')

    @property
    def grid(self) -> tuple[int, int]:
        """The grid ``(gh, gw)`` nearest to it; the same one if it is a grid."""
        return self.rows, (2 * self.num_patches + self.rows) // (2 * self.rows)

    @property
    def lengths(self) -> list[int]:
        """How many anchors each row has."""
        starts = [row * self.num_patches // self.rows for row in range(self.rows + 1)]
        return [end - start for start, end in pairwise(starts)]

    @property
    def largest_cell(self) -> tuple[float, float]:
        """Height and width of the largest anchor, as shares of the image's."""
        return 1 / self.rows, 1 / (self.num_patches // self.rows)

    def anchors(self, device: torch.device) -> Anchors:
        """Centres and half-extents, row by row: ``(N, 2)`` each, float32."""
        num, rows = self.num_patches, self.rows
        index = torch.arange(num, device=device)
        # Row r starts at anchor floor(r*N/R), so anchor n lies in the last row r with r*N < (n+1)*R.
        row = torch.div((index + 1) * rows - 1, num, rounding_mode='floor')
        start = torch.div(row * num, rows, rounding_mode='floor')
        columns = (torch.div((row + 1) * num, rows, rounding_mode='floor') - start).float()
        rows_f = torch.full_like(columns, rows)
        centres = torch.stack(
            [cell_centres((index - start).float(), columns), cell_centres(row.float(), rows_f)], dim=-1
        )
        extents = torch.stack([1 / columns, 1 / rows_f], dim=-1)
        return Anchors(centres, extents, torch.full_like(extents[:, :1], self.motion))


class Layout:
    """A way to lay anchors over an image: of one set of rows or of several, all of them over the whole image.

    A layout of your own is a subclass that gives its ``grids``, or restates `anchors` where rows will not do; no anchor
    may be larger than the largest cell of its grid, or large patches alias. It must not change after it was made, and
    depends on nothing but its arguments.

    Attributes:
        grids: what the anchors are laid in, in their order. The position embedding is resampled to each one's grid
            before it is read at the centres of its patches; pictures show one after the other.

    A subclass that is registered takes the ViT's base grid ``(gh, gw)``, whose aspect the layout should have, and
    options of its own, as config.json holds them; it raises ValueError for one out of range.
    """

    def __init__(self, *grids: Rows) -> None:
        self.grids = grids

    @property
    def num_patches(self) -> int:
        """N."""
        return sum(each.num_patches for each in self.grids)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(self.grids)

    def anchors(self, device: torch.device) -> Anchors:
        """Centres and half-extents of all anchors, and how far their patches may move: N of each, float32."""
        parts = [each.anchors(device) for each in self.grids]
        return Anchors(*(torch.cat(each) for each in zip(*parts, strict=True)))


class CoarseFine(Layout):
    """A coarse grid and a finer one over the same image: every place is seen coarsely, and what matters finely.

    Args:
        base_grid: ``(gh, gw)``.
        coarse: N or ``(gh, gw)`` of the coarse grid, which comes first.
        fine: of the fine one.
        coarse_motion: share of the transform's bounds that patches of the coarse grid may use.
        fine_motion: of the fine one.
    """

    def __init__(
        self,
        base_grid: tuple[int, int],
        coarse: int | Sequence[int],
        fine: int | Sequence[int],
        coarse_motion: float = 1.0,
        fine_motion: float = 1.0,
    ) -> None:
        super().__init__(
            rows_of(coarse, base_grid, check_number('coarse_motion', coarse_motion, 0, 100), 'coarse'),
            rows_of(fine, base_grid, check_number('fine_motion', fine_motion, 0, 100), 'fine'),
        )


LAYOUTS: Parts[type[Layout]] = Parts('layout')


def register_layout(name: str, layout: type[Layout]) -> None:
    """Add a class to `LAYOUTS`, for ``num_patches={'name': name, ...}`` and all else that takes a number of patches.

    Whoever loads a model of it must have imported the file that registers it.

    Raises:
        ValueError: not a subclass of `Layout`, or no name or that of another layout.
    """
    if not (isinstance(layout, type) and issubclass(layout, Layout)):
        raise ValueError(f'expected a subclass of Layout, got {layout!r}')
    LAYOUTS.register(name, layout)


register_layout('coarse_fine', CoarseFine)


def even_grid(layout: Layout) -> tuple[int, int]:
    """Rows and columns of a layout that is one grid of an even number of either, as `divided` needs; or ValueError."""
    rows, columns = layout.grids[0].grid
    is_grid = type(layout).anchors is Layout.anchors and len(layout.grids) == 1 and rows * columns == layout.num_patches
    if not is_grid or rows % 2 or columns % 2:
        raise ValueError(
            'expected num_patches of one grid with an even number of rows and of columns for patches that crowd, such '
            f'as (8, 8), got {layout.num_patches} in {" and ".join(str(each.rows) for each in layout.grids)} rows'
        )
    return rows, columns


def divided(layout: Layout, density: Tensor) -> Anchors:
    """As many anchors as a layout has, small where a density is, that tile the image still: ``(B, N, 2)`` each.

    Mixed-resolution tokenization (Ronen et al. 2023, https://arxiv.org/abs/2304.00287): of the leaves of a quadtree the
    one that holds the most of the density is divided into quarters until there are N. Its roots are blocks of two by
    two cells of the layout's grid, its smallest leaves quarters of the quarters of a cell. So an even density gives the
    grid itself, until some place is four times as dense as another.

    Args:
        layout: an `even_grid`.
        density: over the image, ``(B, h, w)``, above 0 and finite; its gradient is zero.

    Raises:
        ValueError: another layout.
    """
    (rows, columns), device = even_grid(layout), density.device
    sizes = [(rows * 2**level // 2, columns * 2**level // 2) for level in range(4)]
    held = [_held(density, sizes[2])]
    for _ in range(2):
        pairs = held[0][:, ::2] + held[0][:, 1::2]
        held.insert(0, pairs[..., ::2] + pairs[..., 1::2])
    # A leaf holds less than what it is a part of, so the largest of all of them are what is divided.
    every = torch.cat([each.flatten(1) for each in held], dim=1)
    # Many hold the same, as a density may be coarser: the first of them, which no device and no export changes.
    first = 1 + torch.arange(every.shape[1], 0, -1, device=device) * 2.0**-20
    largest = (every * first).topk(layout.num_patches // 4, dim=1).indices
    chosen = torch.zeros_like(every).scatter(1, largest, 1.0) > 0
    is_there, leaves = torch.ones_like(held[0], dtype=torch.bool), []
    for each, own in zip(held, torch.split(chosen, [h * w for h, w in sizes[:3]], dim=1), strict=True):
        parts = own.reshape(each.shape)
        leaves.append(is_there & ~parts)
        is_there = parts.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    leaf = torch.cat([each.flatten(1) for each in (*leaves, is_there)], dim=1)
    index = (leaf * torch.arange(leaf.shape[1], 0, -1, device=device)).topk(layout.num_patches, dim=1).indices
    tiles = [Rows(h * w, h).anchors(device) for h, w in sizes]
    centres, extents = (torch.cat(each)[index] for each in zip(*(tile[:2] for tile in tiles), strict=True))
    centres = centres + 0 * density.sum(dim=(1, 2))[:, None, None]  # what is no number is to tell of itself
    return Anchors(centres, extents, layout.anchors(device).motion)


def _held(density: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """How much of a density ``(B, h, w)`` the cells of another grid hold, ``(B, h', w')``."""
    down, across = (
        common_lengths(length, own, density.device) for length, own in zip(grid_size, density.shape[1:], strict=True)
    )
    # No matrix product, which may round to TF32.
    rows = (down.unsqueeze(2) * density.unsqueeze(1)).sum(dim=2)  # (B, h', w)
    return (rows.unsqueeze(2) * across).sum(dim=3)


def common_lengths(first: int, second: int, device: torch.device) -> Tensor:
    """What each of some equal parts of a length has in common with each of some others, ``(first, second)``.

    In units that make both whole numbers.
    """
    start = torch.arange(first, device=device).unsqueeze(1) * second
    other = torch.arange(second, device=device) * first
    return (torch.minimum(start + second, other + first) - torch.maximum(start, other)).clamp(min=0)


def rows_of(
    num_patches: int | Sequence[int], base_grid: tuple[int, int], motion: float = 1.0, name: str = 'num_patches'
) -> Rows:
    """Rows of N anchors, or of a grid ``(gh, gw)``; ValueError, if it is neither, calls the argument by its name.

    For the N of ``base_grid`` that grid; otherwise there are ``R = round(sqrt(N * gh / gw))`` rows, at least 1 and at
    most N.
    """
    wanted = check_counts(name, 'gh, gw', num_patches)
    if not isinstance(wanted, int):
        return Rows(wanted[0] * wanted[1], wanted[0], motion)
    if wanted == base_grid[0] * base_grid[1]:
        return Rows(wanted, base_grid[0], motion)
    return Rows(wanted, max(1, min(wanted, round(math.sqrt(wanted * base_grid[0] / base_grid[1])))), motion)


def resolve_layout(num_patches: NumPatches, base_grid: tuple[int, int]) -> Layout:
    """The layout of a number of patches, given the grid ``(gh, gw)`` whose aspect it should have; or ValueError."""
    if isinstance(num_patches, Mapping):
        layout: Layout = LAYOUTS.create(num_patches, base_grid)
        return layout
    return Layout(rows_of(num_patches, base_grid))


def check_num_patches(num_patches: NumPatches) -> int | tuple[int, int] | dict[str, Any]:
    """Return a number of patches as an int, a tuple of ints, or a dict that config.json can hold; or ValueError."""
    if isinstance(num_patches, Mapping):
        resolve_layout(num_patches, (1, 1))
        return dict(num_patches)
    return check_counts('num_patches', 'gh, gw', num_patches)

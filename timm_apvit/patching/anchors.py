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

# Differences of worth and of size that count as none.
EVEN = 1e-4


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

    def on_best(self, worth: Tensor, movable: list[int]) -> 'Anchors':
        """Those of such numbers on the cells of a grid that are worth most, ``(B, h, w)``, one on each."""
        (height, width), worth = worth.shape[1:], worth.flatten(1)
        index = torch.arange(height * width, device=worth.device)
        # Where cells are worth the same, those of a sequence that is spread evenly (Roberts 2018).
        spread = (index % width) * 0.7548776662 + torch.div(index, width, rounding_mode='floor') * 0.5698402910
        worth = worth - worth.amax(dim=1, keepdim=True) + EVEN * (spread % 1)
        chosen = worth.topk(len(movable), dim=1).indices.sort(dim=1).values
        cells = Rows(height * width, height).anchors(worth.device).centres
        shape = [worth.shape[0], len(self.centres), 2]
        centres, extents = self.centres.expand(shape).clone(), self.extents.expand(shape).clone()
        centres[:, movable], extents[:, movable] = cells[chosen], extents.new_tensor([1 / width, 1 / height])
        return self._replace(centres=centres, extents=extents)


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

    def movable(self, cells: tuple[int, int]) -> list[int]:
        """Numbers of the anchors that may move, to cells of a grid ``(h, w)``.

        Raises:
            ValueError: fewer cells than such anchors, or larger ones.
        """
        free = [each.motion > 0 for each in self.grids for _ in range(each.num_patches)]
        sizes = [each.largest_cell for each in self.grids if each.motion > 0]
        too_large = any(1 / cells[axis] > size[axis] * (1 + EVEN) for size in sizes for axis in (0, 1))
        if sum(free) > cells[0] * cells[1] or too_large:
            raise ValueError(
                f'expected a grid to choose from that is at least as fine as that of the {sum(free)} patches, got '
                f'{cells[0]} x {cells[1]}: select from more cells along both sides, or take fewer patches'
            )
        return [number for number, each in enumerate(free) if each]

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

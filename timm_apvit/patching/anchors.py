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

    def crowded(self, density: Tensor, least: float) -> 'Anchors':
        """Those that may move, denser where a density is: ``(N, 2)`` -> ``(B, N, 2)``, centres and half-extents.

        Sampling by saliency, as Recasens et al. 2018 (https://arxiv.org/abs/1809.03355), but of whole patches: the
        image is stretched along y, so that rows of one height hold as much of the density, then each row along x. So
        anchors in rows that tile the image still do.

        Args:
            density: over the image, ``(B, h, w)``, above 0.
            least: in a row no place has less than this share of its mean, or patches beside what matters would be wide
                and flat: none is above ``(1 + least) / least`` times as wide as before.
        """
        low, high = ((edge + 1) / 2 for edge in (self.centres - self.extents, self.centres + self.extents))
        rows = density.sum(dim=2).unsqueeze(1)  # (B, 1, h)
        height = density.shape[1]
        top, bottom = (_inverse_cdf(rows, edge[..., 1].unsqueeze(0)) for edge in (low, high))  # (B, N)
        index = torch.arange(height, device=density.device)
        end = torch.minimum(bottom.unsqueeze(-1) * height, index + 1)
        held = (end - torch.maximum(top.unsqueeze(-1) * height, index)).clamp(min=0.0)  # (B, N, h)
        own = (held.unsqueeze(-1) * density.unsqueeze(1)).sum(dim=2)  # no matrix product, which may round to TF32
        own = (own / own.mean(dim=-1, keepdim=True)).clamp(min=least)
        left, right = (_inverse_cdf(own, edge[..., 0].unsqueeze(0)) for edge in (low, high))
        centres = torch.stack([left + right - 1, top + bottom - 1], dim=-1)
        extents = torch.stack([right - left, bottom - top], dim=-1)
        if self.motion is not None:
            stays = self.motion == 0
            centres, extents = torch.where(stays, self.centres, centres), torch.where(stays, self.extents, extents)
        return self._replace(centres=centres, extents=extents)


def _inverse_cdf(weights: Tensor, share: Tensor) -> Tensor:
    """Up to where cells that tile [0, 1] hold a share of all weights: ``(..., n)`` above 0, ``(...)`` -> ``(...)``."""
    weights = weights / weights.sum(dim=-1, keepdim=True)
    # No cumsum, which CUDA refuses where algorithms are to be deterministic.
    before = torch.ones(weights.shape[-1], weights.shape[-1], device=weights.device).tril()
    ends = (weights.unsqueeze(-2) * before).sum(dim=-1)
    share = share.unsqueeze(-1)
    shape = [*(share[..., 0] + weights[..., 0]).shape, weights.shape[-1]]
    index = (ends[..., :-1] <= share).sum(dim=-1, keepdim=True)
    left = (ends.expand(shape).gather(-1, index) - share) / weights.expand(shape).gather(-1, index)
    place: Tensor = ((index + 1 - left) / shape[-1]).squeeze(-1).clamp(0.0, 1.0)
    return place


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

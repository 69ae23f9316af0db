"""A layout of one's own, as a user would write it: a grid over the image and a finer one over its middle."""

import torch

from timm_apvit import Anchors, Layout, Rows, register_layout


class Fovea(Layout):
    """A coarse grid that stays where it is, and as many fine cells over the middle of the image."""

    def __init__(self, base_grid: tuple[int, int], cells: int, middle: float = 0.5) -> None:
        if not 0 < middle <= 1:
            raise ValueError(f'expected middle to be within (0, 1], got {middle}')
        self.middle = middle
        self.grids = (Rows(cells * cells, cells, motion=0.0), Rows(cells * cells, cells))

    def anchors(self, device: torch.device) -> Anchors:
        both = super().anchors(device)
        scale = torch.ones_like(both.centres[:, :1])
        scale[self.grids[0].num_patches :] = self.middle
        return both._replace(centres=both.centres * scale, extents=both.extents * scale)


register_layout('fovea', Fovea)

"""The transform families that come with this package, registered as one of your own would be."""

from typing import ClassVar

import torch
from torch import Tensor

from timm_apvit.patching.transforms import PatchTransform, register_transform
from timm_apvit.patching.warps import MAX_STRAIN, STRAIN_OF_DISPLACEMENT, Spline, perspective_stretch


class Translation(PatchTransform):
    """Move."""


class Scale(PatchTransform):
    """Move, and grow or shrink."""

    fields: ClassVar[dict[str, int]] = Translation.fields | {'scale': 1}


class AnisotropicScale(PatchTransform):
    """Move, and grow or shrink along each axis."""

    fields: ClassVar[dict[str, int]] = Scale.fields | {'aspect': 1}


class Similarity(PatchTransform):
    """Move, grow or shrink, and turn."""

    fields: ClassVar[dict[str, int]] = Scale.fields | {'rotation': 1}


class Affine(PatchTransform):
    """Move, grow or shrink along each axis, turn, and shear."""

    fields: ClassVar[dict[str, int]] = AnisotropicScale.fields | {'rotation': 1, 'shear': 1}


class Projective(PatchTransform):
    """All of that, and be nearer at one end than at the other."""

    fields: ClassVar[dict[str, int]] = Affine.fields | {'perspective': 2}

    def warp(self, parameters: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The perspective v, whose |v_x| + |v_y|, the most that ``v . u`` can be, is at most ``max_perspective``."""
        raw = parameters['perspective']
        raw_x, raw_y = raw[..., :1], raw[..., 1:]
        # Along its diagonals, as a tanh of each of x and y would exceed the bound at the corners of that square.
        up, down = torch.tanh(raw_x + raw_y), torch.tanh(raw_x - raw_y)
        return self.bounds['max_perspective'] / 2 * torch.cat([up + down, up - down], dim=-1), None

    def warp_stretch(self, patch_aspect: float) -> float:
        """See `perspective_stretch`."""
        return perspective_stretch(self.bounds['max_perspective'], patch_aspect)


class ThinPlateSpline(PatchTransform):
    """Move, grow or shrink, turn, and bend: a thin-plate spline through 4 x 4 control points."""

    fields: ClassVar[dict[str, int]] = Similarity.fields | {'warp': 32}

    def __init__(self, **bounds: float) -> None:
        super().__init__(**bounds)
        self.spline = Spline()
        self.max_strain = min(MAX_STRAIN, STRAIN_OF_DISPLACEMENT * self.bounds['max_warp'])

    def warp(self, parameters: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The spline; the raw displacements (x, y) of its control points come row by row."""
        raw = parameters['warp']
        displacements = self.bounds['max_warp'] * torch.tanh(raw).reshape(raw.shape[0], raw.shape[1], 16, 2)
        return None, self.spline(displacements)

    def warp_stretch(self, patch_aspect: float) -> float:
        """One plus the largest strain, in samples rather than half-extents."""
        return 1 + self.max_strain * max(patch_aspect, 1 / patch_aspect)


register_transform('translation', Translation)
register_transform('scale', Scale)
register_transform('anisotropic_scale', AnisotropicScale)
register_transform('similarity', Similarity)
register_transform('affine', Affine)
register_transform('projective', Projective)
register_transform('tps', ThinPlateSpline)

"""A transform family of one's own, as a user would write it: patches that move, and grow wider or narrower only."""

from typing import ClassVar

from timm_apvit import Bound, PatchGeometry, PatchTransform, register_transform
from timm_apvit.patching.anchors import Anchors


class Widening(PatchTransform):
    """Move, and change the width."""

    fields: ClassVar[dict[str, int]] = {'shift': 2, 'width': 1}
    own_bounds: ClassVar[dict[str, Bound]] = {'max_width': Bound(2.0, low=1.0, high=10.0)}

    def forward(self, parameters, anchors: Anchors, image_size, noise=None) -> PatchGeometry:
        factor = self.bounds['max_width'] ** parameters['width'].tanh()
        wide = anchors.extents[..., :1] * factor
        extents = anchors.extents.expand(*wide.shape[:-1], 2).clone()
        extents[..., :1] = wide
        return super().forward(parameters, anchors._replace(extents=extents), image_size, noise)

    def max_footprint(self, layout, image_size, patch_size) -> float:
        return super().max_footprint(layout, image_size, patch_size) * self.bounds['max_width']


register_transform('widening', Widening)

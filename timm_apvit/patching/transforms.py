"""Transform families: what the localisation network predicts for a patch -> where the patch lies in the image.

The sampling grid of Spatial Transformer Networks (Jaderberg et al. 2015, eq. 1) with bounded, named parameters
(`timm_apvit.patching.geometry` has the formula). Raw parameters are unbounded, and zero is the identity. A family is a
small module in one table, `TRANSFORMS`: `timm_apvit.patching.families` has those that come with this package, and
`register_transform` adds one of your own.
"""

import math
import numbers
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from timm_apvit.patching.anchors import Anchors, Layout
from timm_apvit.patching.coords import check_number
from timm_apvit.patching.geometry import PatchGeometry, place_inside
from timm_apvit.patching.parts import Parts


class Bound(NamedTuple):
    """An argument that bounds a transform: its default, and the range that it must lie in."""

    default: float
    low: float = 0.0
    high: float = math.inf


# What every family takes, so that a model may change its family and keep its other arguments. Beyond 1000 there is
# nothing to gain, and in the end gradients overflow.
BOUNDS: dict[str, Bound] = {
    'max_shift': Bound(1.0, high=1000.0),
    'max_zoom': Bound(2.0, low=1.0, high=1000.0),
    'max_rotation': Bound(45.0, high=180.0),
    'max_shear': Bound(0.5, high=1000.0),
    'max_perspective': Bound(0.3, high=0.9),
    'max_warp': Bound(0.25, high=1000.0),
}


class PatchTransform(nn.Module):
    """A family of bounded transforms: raw parameters by field name -> `PatchGeometry`.

    A family of your own is a subclass that says what it predicts in ``fields`` and, where the fields below are not
    enough, warps patches in `warp` or restates `forward`, which ends in `timm_apvit.patching.geometry.place_inside`:
    that keeps the patches inside the image. If patches may then be larger than the bounds say, it restates
    `max_footprint` too, or large ones alias.

    Attributes:
        fields: width of each field of raw parameters. ``shift`` (2) must be among them; ``scale``, ``aspect``,
            ``rotation`` and ``shear`` (1 each) are used if they are. Families nest by these names: a checkpoint of one
            with fewer fields is widened.
        own_bounds: further arguments, of ``timm.create_model`` too, named max_... or min_..., as none of timm's are.
            Theirs, and those of `BOUNDS`, are the values of ``bounds``.

    Bounds:
        max_shift: how far a centre may move along each axis, in cells of its anchor (so that it follows N).
        max_zoom: largest factor by which a patch may grow or shrink along each axis, before it is warped; >= 1.
        max_rotation: in degrees, within [0, 180].
        max_shear: x displacement per unit of y, both patch-local, >= 0.
        max_perspective: share by which a patch may grow or shrink towards a side or corner, within [0, 0.9]: the
            denominator of the projective map lies within 1 +- this all over the patch.
        max_warp: how far each control point of the spline may move along each axis, in half-extents of the patch,
            >= 0. Where that would bring the patch near to folding, the points move less, all by the same factor.

    Raises:
        ValueError: a bound out of range.
        TypeError: an unknown bound.
    """

    fields: ClassVar[dict[str, int]] = {'shift': 2}
    own_bounds: ClassVar[dict[str, Bound]] = {}

    def __init__(self, **bounds: float) -> None:
        super().__init__()
        known = BOUNDS | self.own_bounds
        unknown = [name for name in bounds if name not in known]
        if unknown:
            raise TypeError(f'expected the bounds of a transform among {", ".join(known)}, got {", ".join(unknown)}')
        self.bounds = {
            name: check_number(name, bounds.get(name, bound.default), bound.low, bound.high)
            for name, bound in known.items()
        }

    def extra_repr(self) -> str:
        """Show the bounds."""
        return ', '.join(f'{name}={value:g}' for name, value in self.bounds.items())

    def warp(self, parameters: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The perspective ``(B, N, 2)`` or the spline ``(B, N, 19, 2)`` of each patch; here neither.

        See `timm_apvit.patching.geometry.place_inside`.
        """
        return None, None

    def warp_stretch(self, patch_aspect: float) -> float:
        """Largest factor by which `warp` may enlarge a footprint, for patches of an aspect ``P_w / P_h``."""
        return 1.0

    def max_footprint(self, layout: Layout, image_size: tuple[int, int], patch_size: tuple[int, int]) -> float:
        """Upper bound of `footprint` over all parameters, for the anchors of a layout."""
        patch_aspect = patch_size[1] / patch_size[0]
        largest = 0.0
        for rows in layout.grids:
            height, width = rows.largest_cell
            stretch = 1.0
            if 'scale' in self.fields or 'aspect' in self.fields:
                stretch = self.bounds['max_zoom'] ** rows.motion
            if 'shear' in self.fields:
                shear = self.bounds['max_shear'] * rows.motion * patch_aspect
                stretch = stretch * (shear + math.sqrt(shear * shear + 4)) / 2  # norm of [[1, shear], [0, 1]]
            step = max(image_size[1] * width / patch_size[1], image_size[0] * height / patch_size[0])
            largest = max(largest, step * stretch)
        return largest * self.warp_stretch(patch_aspect)

    def forward(
        self, parameters: dict[str, Tensor], anchors: Anchors, image_size: tuple[int, int], noise: Tensor | None = None
    ) -> PatchGeometry:
        """Bound the parameters and place the patches.

        Args:
            parameters: field name -> raw values ``(B, N, width of the field)``.
            anchors: that the patches start from.
            image_size: ``(H, W)`` in pixels.
            noise: displacement of the centres in units of the patch's own half-extent: ``(B, N, 2)``.
        """
        motion = 1.0 if anchors.motion is None else anchors.motion  # (N, 1)
        shift = torch.tanh(parameters['shift']) * (2 * self.bounds['max_shift'] * motion)
        zero = torch.zeros_like(shift[..., :1])
        scale, aspect, rotation, shear = (
            parameters[name] if name in self.fields else zero for name in ('scale', 'aspect', 'rotation', 'shear')
        )

        # One tanh for the sum of scale and aspect bounds the total zoom along each axis.
        log_zoom = torch.tanh(torch.cat([scale + aspect, scale - aspect], dim=-1)) * math.log(self.bounds['max_zoom'])
        extents = anchors.extents * torch.exp(log_zoom * motion)
        centres = anchors.centres + shift * anchors.extents
        if noise is not None:
            centres = centres + noise * extents
        perspective, spline = self.warp(parameters)
        if anchors.motion is not None:  # less of a warp folds no more than all of it
            share = anchors.motion.clamp(max=1.0)
            perspective = None if perspective is None else perspective * share
            spline = None if spline is None else spline * share.unsqueeze(-1)
        return place_inside(
            centres,
            extents,
            (torch.tanh(rotation) * (math.radians(self.bounds['max_rotation']) * motion)).squeeze(-1),
            (torch.tanh(shear) * (self.bounds['max_shear'] * motion)).squeeze(-1),
            image_size,
            perspective,
            spline,
        )


TRANSFORMS: Parts[type[PatchTransform]] = Parts('transform')


def register_transform(name: str, family: type[PatchTransform]) -> None:
    """Add a family to `TRANSFORMS`, for ``create_model(..., transform=name)`` and all else that takes its name.

    Whoever loads a model of it must have imported the file that registers it. To register a class again, as a notebook
    does whose cell is run twice, replaces it.

    Args:
        name: of the family, what ``config.json`` has.
        family: see `PatchTransform` for what it needs, and an example.

    Raises:
        ValueError: not a subclass of `PatchTransform`, no shift among its fields, a field or a bound that is none or
            has another meaning already, or no name or that of another family.
    """
    if not (isinstance(family, type) and issubclass(family, PatchTransform)):
        raise ValueError(f'expected a subclass of PatchTransform, got {family!r}')
    _check_fields(family)
    _check_own_bounds(family)
    for other_name, other in TRANSFORMS.items():
        for field, width in family.fields.items():
            if other_name != name and other.fields.get(field, width) != width:
                raise ValueError(f'expected the field {field!r} of width {other.fields[field]}, got {width}')
    TRANSFORMS.register(name, family)


def _check_fields(family: type[PatchTransform]) -> None:
    """Raise ValueError unless a localisation network can predict the fields of a family."""
    fields, owner = family.fields, family.__qualname__
    if not isinstance(fields, dict):
        raise ValueError(f'expected the fields of {owner} to be a dict of widths by name, got {fields!r}')
    if 'shift' not in fields:
        raise ValueError(f"expected 'shift' among the fields of {owner}, got {list(fields)}")
    taken = nn.ModuleDict()  # what holds their layers
    for field, width in fields.items():
        if not (isinstance(field, str) and field.isidentifier()) or hasattr(taken, field):
            raise ValueError(f'expected the fields of {owner} to have names that a module may have, got {field!r}')
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f'expected the field {field!r} of {owner} to have a width >= 1, got {width!r}')


def _check_own_bounds(family: type[PatchTransform]) -> None:
    """Raise ValueError unless the bounds of a family can be arguments of a model."""
    own, owner = family.own_bounds, family.__qualname__
    if not isinstance(own, dict):
        raise ValueError(f'expected own_bounds of {owner} to be a dict of Bound by name, got {own!r}')
    for name, bound in own.items():
        # So they cannot be arguments of timm's, today's or later ones, which they would take away from the model.
        if not (isinstance(name, str) and name.isidentifier() and name.startswith(('max_', 'min_'))):
            raise ValueError(f'expected own_bounds of {owner} to be named max_... or min_..., got {name!r}')
        if name in BOUNDS or name == 'max_focus':
            raise ValueError(f'expected own_bounds of {owner} that not all families have, got {name}')
        if not isinstance(bound, Bound) or not all(isinstance(value, numbers.Real) for value in bound):
            raise ValueError(f'expected {name} of {owner} to be a Bound of numbers, got {bound!r}')
        check_number(f'the default of {name}', bound.default, bound.low, bound.high)


def other_bounds(name: str) -> set[str]:
    """The bounds that the family of a name does not have, but another does."""
    every = {bound for family in TRANSFORMS.values() for bound in family.own_bounds}
    return every - TRANSFORMS.named(name).own_bounds.keys()

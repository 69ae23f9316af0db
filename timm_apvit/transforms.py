"""Transform families: what the localisation network predicts for a patch -> where the patch lies in the image.

A patch point u in [-1, 1]^2 lies in the image at ``p = c + D^-1 R D diag(e S) K u``: shear K, scale S times the
anchor's half-extent e, rotation R *in pixels* (``D = diag(W, H) / 2``: rotating in normalised units would shear a
patch wherever the image is not square), centre c. This is the sampling grid of Spatial Transformer Networks
(Jaderberg et al. 2015, eq. 1) with bounded, named parameters. Raw parameters are unbounded, and zero is the identity.
"""

import math
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from timm_apvit.coords import check_number

# Width of each field of parameters. A family is the set of fields that it reads, so that families nest by name.
FIELDS: dict[str, int] = {'shift': 2, 'scale': 1, 'aspect': 1, 'rotation': 1, 'shear': 1}

TRANSFORMS: dict[str, tuple[str, ...]] = {
    'translation': ('shift',),
    'scale': ('shift', 'scale'),
    'anisotropic_scale': ('shift', 'scale', 'aspect'),
    'similarity': ('shift', 'scale', 'rotation'),
    'affine': ('shift', 'scale', 'aspect', 'rotation', 'shear'),
}


class PatchGeometry(NamedTuple):
    """Where the patches of a batch lie.

    Convention:
        (x, y), normalised over pixel edges; y points down, so a positive rotation turns a patch clockwise on the
        screen.

    Attributes:
        centres: ``(B, N, 2)``.
        extents: half-extents along the patch's own axes, before rotation: ``(B, N, 2)``.
        rotation: in radians, measured in pixels: ``(B, N)``.
        shear: x displacement per unit of y, in the patch's own frame: ``(B, N)``.
        image_from_patch: linear part of the map from patch-local to image coordinates: ``(B, N, 2, 2)``.
        saliency: logits of where the localisation network looks, ``(B, h, w)`` over the image; None without focus.
        window: centre (x, y) and half-extent of where the anchors were put, ``(B, 3)``; None without focus. Where an
            image is padded or cropped to whole patches, this and the saliency are of what the patches tile.
    """

    centres: Tensor
    extents: Tensor
    rotation: Tensor
    shear: Tensor
    image_from_patch: Tensor
    saliency: Optional[Tensor] = None
    window: Optional[Tensor] = None

    def points(self, local: Tensor) -> Tensor:
        """Map patch-local points ``(..., 2)`` of [-1, 1]^2 into the image: ``(B, N, ..., 2)``."""
        return patch_points(self, local)

    def outlines(self, points_per_side: int = 1) -> Tensor:
        """Closed outline of every patch: ``(B, N, 4 * points_per_side + 1, 2)``, clockwise from its top-left corner."""
        step = (
            torch.arange(points_per_side, device=self.centres.device, dtype=torch.float32) * (2 / points_per_side) - 1
        )
        one = torch.ones_like(step)
        sides = [(step, -one), (one, step), (-step, one), (-one, -step), (-one[:1], -one[:1])]
        return self.points(torch.cat([torch.stack(side, dim=-1) for side in sides]))


def patch_points(geometry: PatchGeometry, local: Tensor) -> Tensor:
    """Map patch-local points ``(..., 2)`` of [-1, 1]^2 into the image: ``(B, N, ..., 2)``."""
    shape = geometry.centres.shape
    # Products and sums rather than a matrix product: autocast would round a matrix product's coordinates to bfloat16.
    u = local.reshape(1, 1, -1, 2)
    centres, matrices = geometry.centres.unsqueeze(2), geometry.image_from_patch.unsqueeze(2)
    points = centres + (matrices[..., 0] * u[..., :1] + matrices[..., 1] * u[..., 1:])
    return points.reshape(list(shape[:2]) + list(local.shape))


def footprint(image_from_patch: Tensor, image_size: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Source pixels per sample step along the patch's most stretched direction: ``(B, N, 2, 2)`` -> ``(B, N)``.

    The larger singular value of d(source pixel) / d(sample), in closed form (half the sum of two hypotenuses).
    """
    # Keeps the gradient finite where the map is isotropic; a power of two, so that sqrt(eps^2) - eps is exactly 0.
    eps = 2.0**-10
    xx = image_from_patch[..., 0, 0] * (image_size[1] / patch_size[1])
    xy = image_from_patch[..., 0, 1] * (image_size[1] / patch_size[0])
    yx = image_from_patch[..., 1, 0] * (image_size[0] / patch_size[1])
    yy = image_from_patch[..., 1, 1] * (image_size[0] / patch_size[0])
    rotational = torch.sqrt((xx + yy) ** 2 + (yx - xy) ** 2)  # positive: no family mirrors a patch
    deviatoric = torch.sqrt((xx - yy) ** 2 + (yx + xy) ** 2 + eps**2) - eps
    return (rotational + deviatoric) / 2


class _InwardClamp(torch.autograd.Function):
    """Clamp whose gradient still reaches what is pinned at a bound, if a descent step would move it inwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, low), high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, low, high = ctx.saved_tensors
        grad = grads[0]
        inward = ((x < high) | (grad > 0)) & ((x > low) | (grad < 0))
        zero = torch.zeros_like(grad)
        return torch.where(inward, grad, zero), torch.where(x < low, grad, zero), torch.where(x > high, grad, zero)


def inward_clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clamp ``x`` to [``low``, ``high``], all of one shape, and let gradients move what is at a bound back inside.

    A plain clamp passes nothing to what lies outside, and minimum / maximum half at a tie: a border patch, which starts
    exactly at its bound, would never move.
    """
    if torch.jit.is_scripting():
        # TorchScript has no gradients of our own: there, those that lead outwards pass as well.
        value = torch.where(x < low, low, torch.where(x > high, high, x))
        return value + torch.where((x < low) | (x > high), x - x.detach(), torch.zeros_like(x))
    clamped: Tensor = _InwardClamp.apply(x, low, high)
    return clamped


def place_inside(
    centres: Tensor, extents: Tensor, rotation: Tensor, shear: Tensor, image_size: tuple[int, int]
) -> PatchGeometry:
    """Put patches wholly inside the image: shrink what is wider than it (keeping its shape), then shift it.

    Args:
        centres: wanted centres ``(B, N, 2)``.
        extents: wanted half-extents ``(B, N, 2)``.
        rotation: ``(B, N)``, radians.
        shear: ``(B, N)``.
        image_size: ``(H, W)`` in pixels.
    """
    cos, sin = torch.cos(rotation), torch.sin(rotation)
    width, height = extents[..., 0], extents[..., 1]
    aspect = image_size[0] / image_size[1]
    sheared = shear * width
    x_from_xy = torch.stack([cos * width, cos * sheared - sin * aspect * height], dim=-1)
    y_from_xy = torch.stack([sin / aspect * width, sin / aspect * sheared + cos * height], dim=-1)
    matrices = torch.stack([x_from_xy, y_from_xy], dim=-2)  # (B, N, 2, 2)

    box = matrices.abs().sum(dim=-1)  # half the bounding box of the transformed patch: (B, N, 2)
    reach = box.amax(dim=-1)
    shrink = inward_clamp(reach, torch.zeros_like(reach), torch.ones_like(reach)) / reach
    box = box * shrink.unsqueeze(-1)
    return PatchGeometry(
        centres=inward_clamp(centres, box - 1, 1 - box),
        extents=extents * shrink.unsqueeze(-1),
        rotation=rotation,
        shear=shear,
        image_from_patch=matrices * shrink.unsqueeze(-1).unsqueeze(-1),
    )


class PatchTransform(nn.Module):
    """Bounded transforms up to the affine one: raw parameters by field name -> `PatchGeometry`.

    Args:
        name: a key of `TRANSFORMS`.
        max_shift: how far a centre may move along each axis, in cells of its anchor (so that it follows N).
        max_zoom: largest factor by which a patch may grow or shrink along each axis, >= 1.
        max_rotation: in degrees, within [0, 180].
        max_shear: x displacement per unit of y, both patch-local, >= 0.

    Raises:
        ValueError: an unknown name or a bound out of range.
    """

    fields: list[str]

    def __init__(
        self,
        name: str = 'scale',
        max_shift: float = 1.0,
        max_zoom: float = 2.0,
        max_rotation: float = 45.0,
        max_shear: float = 0.5,
    ) -> None:
        super().__init__()
        if not isinstance(name, str) or name not in TRANSFORMS:
            raise ValueError(f'expected transform to be one of {", ".join(TRANSFORMS)}, got {name!r}')
        self.name = name
        self.fields = list(TRANSFORMS[name])
        self.bounds = {
            'max_shift': check_number('max_shift', max_shift, 0),
            'max_zoom': check_number('max_zoom', max_zoom, 1),
            'max_rotation': check_number('max_rotation', max_rotation, 0, 180),
            'max_shear': check_number('max_shear', max_shear, 0),
        }
        self.max_shift = self.bounds['max_shift']
        self.max_log_zoom = math.log(self.bounds['max_zoom'])
        self.max_rotation = math.radians(self.bounds['max_rotation'])
        self.max_shear = self.bounds['max_shear']

    def extra_repr(self) -> str:
        """Show the family and its bounds."""
        return ', '.join([repr(self.name), *(f'{name}={value:g}' for name, value in self.bounds.items())])

    def max_footprint(self, layout: tuple[int, int], image_size: tuple[int, int], patch_size: tuple[int, int]) -> float:
        """Upper bound of `footprint` over all parameters, for the anchors of a layout."""
        widest = image_size[1] / (layout[0] // layout[1]) / patch_size[1]
        highest = image_size[0] / layout[1] / patch_size[0]
        stretch = 1.0
        if 'scale' in self.fields:
            stretch = math.exp(self.max_log_zoom)
        if 'shear' in self.fields:
            shear = self.max_shear * patch_size[1] / patch_size[0]
            stretch = stretch * (shear + math.sqrt(shear * shear + 4)) / 2  # norm of [[1, shear], [0, 1]]
        return max(widest, highest) * stretch

    def forward(
        self,
        parameters: dict[str, Tensor],
        anchor_centres: Tensor,
        anchor_extents: Tensor,
        image_size: tuple[int, int],
        noise: Optional[Tensor] = None,
    ) -> PatchGeometry:
        """Bound the parameters and place the patches.

        Args:
            parameters: field name -> raw values ``(B, N, width of the field)``.
            anchor_centres: ``(N, 2)`` or ``(B, N, 2)``.
            anchor_extents: half-extents, of the same shape.
            image_size: ``(H, W)`` in pixels.
            noise: displacement of the centres in units of the patch's own half-extent: ``(B, N, 2)``.
        """
        shift = torch.tanh(parameters['shift'])
        zero = torch.zeros_like(shift[..., :1])
        scale = parameters['scale'] if 'scale' in self.fields else zero
        aspect = parameters['aspect'] if 'aspect' in self.fields else zero
        rotation = parameters['rotation'] if 'rotation' in self.fields else zero
        shear = parameters['shear'] if 'shear' in self.fields else zero

        # One tanh for the sum of scale and aspect bounds the total zoom along each axis.
        log_zoom = self.max_log_zoom * torch.tanh(torch.cat([scale + aspect, scale - aspect], dim=-1))
        extents = anchor_extents * torch.exp(log_zoom)
        centres = anchor_centres + shift * (2 * self.max_shift) * anchor_extents
        if noise is not None:
            centres = centres + noise * extents
        return place_inside(
            centres,
            extents,
            self.max_rotation * torch.tanh(rotation).squeeze(-1),
            self.max_shear * torch.tanh(shear).squeeze(-1),
            image_size,
        )

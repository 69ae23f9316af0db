"""Where patches lie: the map from a patch to the image, its Jacobian, and how it is kept inside the image.

A patch point u in [-1, 1]^2 lies in the image at ``p = c + D^-1 R D diag(e S) K V(u)``: warp V
(`timm_apvit.patching.warps`), shear K, scale S times the anchor's half-extent e, rotation R *in pixels*
(``D = diag(W, H) / 2``: rotating in normalised units would shear a patch wherever the image is not square), centre c.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_apvit.patching.anchors import Anchors
from timm_apvit.patching.coords import vector_on
from timm_apvit.patching.warps import OUTLINE_MARGIN, OUTLINE_POINTS, lattice, outline_points, warp_jacobians, warped


class PatchGeometry(NamedTuple):
    """Where the patches of a batch lie.

    Convention:
        (x, y), normalised over pixel edges; y points down, so a positive rotation turns a patch clockwise on the
        screen.

    Attributes:
        centres: ``(B, N, 2)``; where a patch's own (0, 0) lies, whatever its warp.
        extents: half-extents along the patch's own axes, before rotation and warp: ``(B, N, 2)``.
        rotation: in radians, measured in pixels: ``(B, N)``.
        shear: x displacement per unit of y, in the patch's own frame: ``(B, N)``.
        image_from_patch: linear part of the map from patch-local to image coordinates, without the warp:
            ``(B, N, 2, 2)``.
        saliency: logits of where the localisation network looks, ``(B, h, w)`` over the image; None: it does not say.
        window: centre (x, y) and half-extent of where the anchors were put, ``(B, 3)``; None: all of the image. Where
            an image is padded or cropped to whole patches, this and the saliency are of what the patches tile.
        started: the anchors that the patches start from, ``(B, N, 2)`` each, where they lie in a window or
            crowd; None: those of the layout. Of a crowd they are in an order of their own.
        logits: what the localiser answers by itself, ``(B, classes)``; None: nothing.
        perspective: v of the projective warp ``u / (1 + v . u)``, ``(B, N, 2)``; None: there is none.
        spline: coefficients of a thin-plate spline's displacements, ``(B, N, 19, 2)``: of 16 kernels, of 1, x and y;
            None: there is none.
    """

    centres: Tensor
    extents: Tensor
    rotation: Tensor
    shear: Tensor
    image_from_patch: Tensor
    saliency: Tensor | None = None
    window: Tensor | None = None
    started: Anchors | None = None
    logits: Tensor | None = None
    perspective: Tensor | None = None
    spline: Tensor | None = None

    def points(self, local: Tensor) -> Tensor:
        """Map patch-local points ``(..., 2)`` of [-1, 1]^2 into the image: ``(B, N, ..., 2)``."""
        u = warped(self.perspective, self.spline, local.reshape(-1, 2)).unsqueeze(1)  # (B, 1, N, P, 2)
        centres, matrices = self.centres.transpose(1, 2).unsqueeze(-1), self.image_from_patch.transpose(1, 2)
        # As planes of x and of y, which take a third of the time of pairs, and which grid_sample reads as they are.
        points = torch.addcmul(torch.addcmul(centres, matrices[..., :1], u[..., 0]), matrices[..., 1:], u[..., 1])
        # (B, 2, N, P) -> (B, N, ..., 2)
        return points.movedim(1, -1).reshape(list(self.centres.shape[:2]) + list(local.shape))

    def in_layout(self, anchors: Anchors) -> tuple[Tensor, Tensor]:
        """Centres and half-extents ``(B, N, 2)`` as if the window, if there is one, were the image."""
        if self.window is None or self.started is None:
            return self.centres, self.extents
        ratio = anchors.extents / self.started.extents
        return (self.centres - self.started.centres) * ratio + anchors.centres, self.extents * ratio

    def moves(self, anchors: Anchors) -> Tensor:
        """How far centres are from where they started, ``(B, N, 2)``, as if the window, if any, were the image."""
        moved = self.centres - (self.started or anchors).centres
        return moved if self.window is None else moved / self.window[:, None, 2:]

    def in_frame(self, own: tuple[int, int], other: tuple[int, int]) -> 'PatchGeometry':
        """The same patches in an image of another size ``(H, W)``, that has the same top-left corner and pixels."""
        ratio = vector_on((own[1] / other[1], own[0] / other[0]), self.centres.device)
        started = self.started
        if started is not None:
            started = started._replace(centres=(started.centres + 1) * ratio - 1, extents=started.extents * ratio)
        return self._replace(  # angles are those of pixels
            centres=(self.centres + 1) * ratio - 1,
            extents=self.extents * ratio,
            started=started,
            image_from_patch=self.image_from_patch * ratio[:, None],
        )

    def outlines(self, points_per_side: int = 1) -> Tensor:
        """Closed outline of every patch: ``(B, N, 4 * points_per_side + 1, 2)``, clockwise from its top-left corner.

        The sides of a spline's patch are curved: ask for more than their ends.
        """
        local = outline_points(points_per_side, self.centres.device, torch.float32)
        return self.points(torch.cat([local, local[:1]]))


def patch_jacobians(geometry: PatchGeometry, local: Tensor) -> Tensor:
    """Jacobians d(image point) / d(patch-local point) at points ``(..., 2)``: ``(B, N, ..., 2, 2)``.

    Without a warp it is the same at all points, and they are 1 along each of their axes.
    """
    shape = geometry.centres.shape
    inner = warp_jacobians(geometry.perspective, geometry.spline, local.reshape(-1, 2))  # (B, N, 2, 2, P)
    matrices = geometry.image_from_patch.unsqueeze(-1).unsqueeze(-1)  # (B, N, 2, 2, 1, 1)
    product = matrices[:, :, :, 0] * inner[:, :, :1] + matrices[:, :, :, 1] * inner[:, :, 1:]
    jacobians = product.permute(0, 1, 4, 2, 3)
    axes = [1] * (local.dim() - 1) if jacobians.shape[2] == 1 else list(local.shape[:-1])
    return jacobians.reshape(list(shape[:2]) + axes + [2, 2])


def transformed(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Matrices ``(B, N, 2, 2)`` times vectors ``(B, N, P, 2)``, of which B, N may be 1: ``(B, N, P, 2)``."""
    matrices = matrices.unsqueeze(2)
    # Products and sums rather than a matrix product: autocast would round a matrix product's coordinates to bfloat16.
    return matrices[..., 0] * vectors[..., :1] + matrices[..., 1] * vectors[..., 1:]


def footprint(image_from_patch: Tensor, image_size: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Source pixels per sample step along the patch's most stretched direction: ``(..., 2, 2)`` -> ``(...)``.

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
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        # A trace has no gradients of our own: there, those that lead outwards pass as well.
        value = torch.where(x < low, low, torch.where(x > high, high, x))
        return value + torch.where((x < low) | (x > high), x - x.detach(), torch.zeros_like(x))
    clamped: Tensor = _InwardClamp.apply(x, low, high)
    return clamped


def bounding_box(matrices: Tensor, perspective: Tensor | None, spline: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least and greatest (x, y) of warped patches about their centres, two ``(B, N, 2)``; matrices ``(B, N, 2, 2)``.

    Exact but for a spline, of which it is a bound. A warp does not fold, so that a patch's outline bounds it all: lines
    of a projective one stay lines, and its corners do.
    """
    if perspective is None and spline is None:
        half = matrices.abs().sum(dim=-1)
        return -half, half
    outline = outline_points(1 if spline is None else OUTLINE_POINTS, matrices.device, matrices.dtype)
    inner = warped(perspective, spline, outline)
    points = transformed(matrices, inner)
    low, high = points.amin(dim=2), points.amax(dim=2)
    if spline is not None:
        # Between these points it may leave their chords, by a part of the control points' displacements.
        control = lattice(matrices.device, matrices.dtype)
        moved = (warped(perspective, spline, control) - control).abs().amax(dim=2, keepdim=True)
        beyond = OUTLINE_MARGIN * transformed(matrices.abs(), moved).squeeze(2)
        low, high = low - beyond, high + beyond
    return low, high


def place_inside(
    centres: Tensor,
    extents: Tensor,
    rotation: Tensor,
    shear: Tensor,
    image_size: tuple[int, int],
    perspective: Tensor | None = None,
    spline: Tensor | None = None,
) -> PatchGeometry:
    """Put patches wholly inside the image: shrink what is wider than it (keeping its shape), then shift it.

    All as in `PatchGeometry`, as they are wanted, for images of ``image_size`` ``(H, W)`` pixels.

    Raises:
        ValueError: both a perspective and a spline.
    """
    if perspective is not None and spline is not None:
        raise ValueError('expected a perspective or a spline, got both')
    cos, sin = torch.cos(rotation), torch.sin(rotation)
    width, height = extents[..., 0], extents[..., 1]
    aspect = image_size[0] / image_size[1]
    sheared = shear * width
    x_from_xy = torch.stack([cos * width, cos * sheared - sin * aspect * height], dim=-1)
    y_from_xy = torch.stack([sin / aspect * width, sin / aspect * sheared + cos * height], dim=-1)
    matrices = torch.stack([x_from_xy, y_from_xy], dim=-2)  # (B, N, 2, 2)

    low, high = bounding_box(matrices, perspective, spline)
    reach = (high - low).amax(dim=-1) / 2
    shrink = inward_clamp(reach, torch.zeros_like(reach), torch.ones_like(reach)) / reach
    low, high = low * shrink.unsqueeze(-1), high * shrink.unsqueeze(-1)
    return PatchGeometry(
        centres=inward_clamp(centres, -1 - low, 1 - high),
        extents=extents * shrink.unsqueeze(-1),
        rotation=rotation,
        shear=shear,
        image_from_patch=matrices * shrink.unsqueeze(-1).unsqueeze(-1),
        perspective=perspective,
        spline=spline,
    )

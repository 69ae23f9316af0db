"""Adaptive patching, standing alone: image -> patches and where they were taken."""

from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available

import timm_apvit.families  # noqa: F401  registers them
from timm_apvit.coords import NumPatches, anchors, check_number, check_patch_size, resolve_layout, sample_grid
from timm_apvit.focus import LARGEST_FOCUS, FocusNetwork
from timm_apvit.geometry import PatchGeometry, footprint, patch_jacobians, patch_points
from timm_apvit.localizer import Localizer
from timm_apvit.sampling import mip_pyramid, num_mip_levels, sample_patches
from timm_apvit.transforms import transform_family


class AdaptivePatching(nn.Module):
    """Learned, content-aware patches: ``(B, C, H, W)`` -> ``(B, N, C, P_h, P_w)`` and their `PatchGeometry`.

    A localisation network predicts a bounded transform for each of N anchors that tile the image; each patch is sampled
    through its transform, anti-aliased and differentiably. A new layer is the identity: at the full grid its patches
    are the pixels of a fixed grid. Parameters depend neither on N nor on the image size, and both may change from
    call to call. Images of any size >= 1 x 1 work, an empty batch too.

    Args:
        patch_size: samples P along a patch's side, or ``(P_h, P_w)``.
        num_patches: N, or ``(gh, gw)``. N alone is laid out in about as many rows as columns.
        transform: a key of `TRANSFORMS`: what each patch may do.
        in_chans: image channels C.
        jitter: standard deviation of the noise on the patches' centres in train mode, in units of their own
            half-extents.
        max_shift: how far a patch may move along each axis, in cells of its anchor.
        max_zoom: largest factor by which a patch may grow or shrink along each axis.
        max_rotation: in degrees.
        max_shear: x displacement per unit of y.
        max_perspective: share by which a projective patch may grow or shrink towards a side or corner, at most 0.9.
        max_warp: how far each of a spline's 4 x 4 control points may move along each axis, in half-extents of the
            patch.
        max_focus: largest factor by which the anchors as a whole close in on what matters in the image
            (`timm_apvit.focus`), at most 5; 1: they tile the image. It has lessons of its own, and learns nothing
            without them (`timm_apvit.finetuning.guidance`).
        device: of the parameters.
        dtype: of the parameters.
        own_bounds: further bounds of a family of your own.

    Raises:
        TypeError: a bound that the family does not have.
        ValueError: an argument out of range, or an image that is not a floating-point ``(B, C, H, W)``.

    Example:
        >>> patching = AdaptivePatching(patch_size=16, num_patches=(14, 14))
        >>> patches, geometry = patching(torch.rand(1, 3, 224, 224))
        >>> patches.shape, geometry.centres.shape
        (torch.Size([1, 196, 3, 16, 16]), torch.Size([1, 196, 2]))
    """

    def __init__(
        self,
        patch_size: int | tuple[int, int] = 16,
        num_patches: NumPatches = (14, 14),
        transform: str = 'scale',
        in_chans: int = 3,
        jitter: float = 0.0,
        max_shift: float = 1.0,
        max_zoom: float = 2.0,
        max_rotation: float = 45.0,
        max_shear: float = 0.5,
        max_perspective: float = 0.3,
        max_warp: float = 0.25,
        max_focus: float = 1.0,
        device: Any = None,
        dtype: Any = None,
        **own_bounds: float,
    ) -> None:
        super().__init__()
        self.patch_size = check_patch_size(patch_size)
        self.in_chans = in_chans
        self.jitter = check_number('jitter', jitter, 0)
        self.max_focus = check_number('max_focus', max_focus, 1, LARGEST_FOCUS)
        # Share of the images that are seen whole, without focus, in train mode: only there can attention say what
        # matters in all of an image. The training sets it.
        self.whole_share = 0.0
        self.set_num_patches(num_patches)
        self.family = transform
        self.transform = transform_family(transform)(
            max_shift=max_shift,
            max_zoom=max_zoom,
            max_rotation=max_rotation,
            max_shear=max_shear,
            max_perspective=max_perspective,
            max_warp=max_warp,
            **own_bounds,
        )
        self.localizer = Localizer(self.transform.fields, in_chans, device=device, dtype=dtype)
        self.focus = FocusNetwork(self.localizer.width, device=device, dtype=dtype) if self.max_focus > 1 else None

    @torch.jit.ignore
    def bounds(self) -> dict[str, Any]:
        """The arguments that say what patches may do."""
        own = {'transform': self.family, 'jitter': self.jitter, 'max_focus': self.max_focus}
        return {**own, **self.transform.bounds}

    @torch.jit.ignore
    def set_num_patches(self, num_patches: NumPatches) -> None:
        """Take N or ``(gh, gw)`` patches from now on.

        Raises:
            ValueError: neither an integer >= 1 nor two of them.
        """
        self.layout = resolve_layout(num_patches, (1, 1))

    def forward(self, image: Tensor, layout: Optional[tuple[int, int]] = None) -> tuple[Tensor, PatchGeometry]:
        """Take the patches of a batch.

        Args:
            image: ``(B, C, H, W)``, floating point.
            layout: ``(N, rows)`` of the anchors, for this call alone; default: that of ``num_patches``.

        Returns:
            Patches ``(B, N, C, P_h, P_w)``, float32, and the geometry of the batch.
        """
        if image.dim() != 4 or image.shape[1] != self.in_chans or min(image.shape[2], image.shape[3]) < 1:
            raise ValueError(f'expected an image of shape (B, {self.in_chans}, H, W), got {list(image.shape)}')
        if not image.is_floating_point():
            raise ValueError(f'expected a normalised floating-point image, got dtype {image.dtype}')
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript would compile what an `and` joins
            # Where patches lie, and what is read there, is float32 whatever surrounds it.
            if is_autocast_available(image.device.type) and torch.is_autocast_enabled(image.device.type):
                with torch.autocast(image.device.type, enabled=False):
                    return self._patches(image, layout)
        return self._patches(image, layout)

    def _patches(self, image: Tensor, layout: Optional[tuple[int, int]]) -> tuple[Tensor, PatchGeometry]:
        """What `forward` returns, for an image that it accepts."""
        used = self.layout if layout is None else layout
        if not 1 <= used[1] <= used[0]:
            raise ValueError(f'expected a layout (N, rows) with 1 <= rows <= N, got ({used[0]}, {used[1]})')
        image_size = (image.shape[2], image.shape[3])

        seen, num_levels = self.localizer.level(image_size), self._num_levels(image_size, used)
        pyramid = mip_pyramid(image.float(), max(num_levels, seen + 1))  # in float32, as coordinates are
        features, context = self.localizer.look(pyramid[seen])
        centres, extents = anchors(used, image.device)
        saliency: Optional[Tensor] = None
        window: Optional[Tensor] = None
        if self.focus is not None:
            found = self.focus(features, context, self.max_focus)
            saliency, window = found.saliency, self._seen(found.window)
            extent = window[:, None, 2:]
            centres = window[:, None, :2] + extent * centres  # (B, N, 2)
            extents = extent * extents
        parameters = self.localizer(features, context, centres, extents)
        noise: Optional[Tensor] = None
        if self.training and self.jitter > 0:
            noise = self.jitter * torch.randn_like(parameters['shift'])
        placed = self.transform(parameters, centres, extents, image_size, noise)
        geometry = PatchGeometry(
            placed.centres,
            placed.extents,
            placed.rotation,
            placed.shear,
            placed.image_from_patch,
            saliency,
            window,
            placed.perspective,
            placed.spline,
        )
        return self._sample(pyramid[:num_levels], geometry), geometry

    def sample(self, image: Tensor, geometry: PatchGeometry, layout: tuple[int, int]) -> Tensor:
        """Sample the patches of a geometry, at most as large as those of a layout ``(N, rows)`` may become."""
        num_levels = self._num_levels((image.shape[2], image.shape[3]), layout)
        return self._sample(mip_pyramid(image.float(), num_levels), geometry)

    def _num_levels(self, image_size: tuple[int, int], layout: tuple[int, int]) -> int:
        """How many mip levels the patches of a layout may be read from."""
        return num_mip_levels(self.transform.max_footprint(layout, image_size, self.patch_size), image_size)

    def _sample(self, pyramid: list[Tensor], geometry: PatchGeometry) -> Tensor:
        image = pyramid[0]
        local = sample_grid(self.patch_size, image.device)
        jacobians = patch_jacobians(geometry, local)
        steps = footprint(jacobians, (image.shape[2], image.shape[3]), self.patch_size)
        return sample_patches(pyramid, patch_points(geometry, local), steps)

    def _seen(self, window: Tensor) -> Tensor:
        """The windows ``(B, 3)``, but for some images that are seen whole in train mode."""
        if self.training and self.whole_share > 0:
            whole = torch.rand(window.shape[0], 1, device=window.device) < self.whole_share
            window = torch.where(whole, torch.tensor([0.0, 0.0, 1.0], device=window.device), window)
        return window

"""Adaptive patching, standing alone: image -> patches and where they were taken."""

from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import timm_apvit.patching.cnn
import timm_apvit.patching.families
import timm_apvit.patching.saliency  # noqa: F401  registers them, as the lines above do
from timm_apvit.patching.anchors import Layout, NumPatches, divided, resolve_layout
from timm_apvit.patching.coords import check_number, check_patch_size, check_shape, in_float32, sample_grid, vector_on
from timm_apvit.patching.geometry import PatchGeometry, footprint, patch_jacobians
from timm_apvit.patching.localizers import LOCALIZERS, MOST_CROWD, Localizer, Look
from timm_apvit.patching.sampling import mip_pyramid, num_mip_levels, sample_patches
from timm_apvit.patching.transforms import TRANSFORMS
from timm_apvit.patching.windows import WHOLE, shifted_window, window_inside


class AdaptivePatching(nn.Module):
    """Learned, content-aware patches: ``(B, C, H, W)`` -> ``(B, N, C, P_h, P_w)`` and their `PatchGeometry`.

    A localiser predicts a bounded transform for each of N anchors that tile the image; each patch is sampled through
    its transform, anti-aliased and differentiably. A new layer is the identity: at the full grid its patches are the
    pixels of a fixed grid. Parameters depend neither on N nor on the image size, and both may change from call to call.
    Images of any size >= 1 x 1 work, an empty batch too.

    Args:
        patch_size: samples P along a patch's side, or ``(P_h, P_w)``.
        num_patches: N, ``(gh, gw)``, or a layout by name (`timm_apvit.patching.anchors`). N alone is laid out in
            cells about as square as those of the base grid.
        transform: what each patch may do: ``'translation'``, ``'scale'``, ``'anisotropic_scale'``, ``'similarity'``,
            ``'affine'``, ``'projective'``, ``'tps'``, or a family of your own (`register_transform`).
        localizer: what says where patches lie: ``'cnn'``, with options ``{'name': 'cnn', 'side': 32}``,
            ``'saliency'``, or one of your own (`register_localizer`).
        in_chans: image channels C.
        jitter: standard deviation of the noise on the patches' centres in train mode, in units of their own
            half-extents.
        window_jitter: in train mode, of the noise on the centre of a window, in its own half-extents, and on the
            logarithm of its size.
        whole_share: share of the images that are seen whole in train mode, rather than in their window, or evenly.
        device: of the parameters.
        dtype: of the parameters.
        bounds: of the transform (`timm_apvit.patching.transforms`): ``max_shift``, ``max_zoom``, ``max_rotation``,
            ``max_shear``, ``max_perspective``, ``max_warp``, and those of a family of your own.

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
        localizer: Any = 'cnn',
        in_chans: int = 3,
        jitter: float = 0.0,
        window_jitter: float = 0.15,
        whole_share: float = 0.1,
        device: Any = None,
        dtype: Any = None,
        **bounds: float,
    ) -> None:
        super().__init__()
        self.patch_size = check_patch_size(patch_size)
        self.in_chans = in_chans
        self.jitter = check_number('jitter', jitter, 0)
        self.window_jitter = check_number('window_jitter', window_jitter, 0, 1)
        self.whole_share = check_number('whole_share', whole_share, 0, 1)
        self.set_num_patches(num_patches)
        self.family = transform
        self.transform = TRANSFORMS.named(transform)(**bounds)
        self.localizer_spec = deepcopy(localizer)
        self.localizer: Localizer = LOCALIZERS.create(
            localizer, self.transform.fields, in_chans=in_chans, device=device, dtype=dtype
        )

    def arguments(self) -> dict[str, Any]:
        """The arguments that say what patches may do and what places them, as config.json can hold them."""
        own = {'transform': self.family, 'localizer': self.localizer.specification(self.localizer_spec)}
        exposure = {name: getattr(self, name) for name in ('jitter', 'window_jitter', 'whole_share')}
        return {**own, **exposure, **self.transform.bounds}

    def set_num_patches(self, num_patches: NumPatches) -> None:
        """Take N, ``(gh, gw)`` or a layout by name from now on; ValueError if it is none of them."""
        self.layout = resolve_layout(num_patches, (1, 1))

    def forward(self, image: Tensor, layout: Layout | None = None) -> tuple[Tensor, PatchGeometry]:
        """Take the patches of a batch.

        Args:
            image: ``(B, C, H, W)``, floating point.
            layout: of the anchors, for this call alone; default: that of ``num_patches``.

        Returns:
            Patches ``(B, N, C, P_h, P_w)``, float32, and the geometry of the batch.
        """
        self.check_image(image)
        layout = layout or self.layout
        image_size = (image.shape[2], image.shape[3])
        with in_float32(image.device):
            num_levels = self.num_levels(image_size, layout)
            pyramid = mip_pyramid(image.float(), max(num_levels, self.localizer.level(image_size) + 1))
        with nullcontext() if self.localizer.under_autocast else in_float32(image.device):
            look = self.localizer.look(pyramid)
        with in_float32(image.device):
            geometry = self._located(image, look, layout)
            return self._sample(pyramid[:num_levels], geometry), geometry

    def check_image(self, image: Tensor) -> None:
        """Raise ValueError unless it is a batch of images ``(B, C, H, W)``, floating point."""
        if image.dim() != 4 or image.shape[1] != self.in_chans or min(image.shape[2], image.shape[3]) < 1:
            raise ValueError(f'expected an image of shape (B, {self.in_chans}, H, W), got {list(image.shape)}')
        if not image.is_floating_point():
            raise ValueError(f'expected a normalised floating-point image, got dtype {image.dtype}')

    def unmoved(self, pyramid: list[Tensor], layout: Layout) -> tuple[Tensor, PatchGeometry]:
        """The patches of a layout where its anchors are, from the mip levels of a batch; as `forward` returns them."""
        image = pyramid[0]
        none = {k: image.new_zeros(image.shape[0], layout.num_patches, n) for k, n in self.transform.fields.items()}
        image_size = (image.shape[2], image.shape[3])
        with in_float32(image.device):
            geometry = self.transform(none, layout.anchors(image.device), image_size, None)
            return self._sample(pyramid[: self.num_levels(image_size, layout)], geometry), geometry

    def sample(self, image: Tensor, geometry: PatchGeometry, layout: Layout) -> Tensor:
        """Sample the patches of a geometry, at most as large as those of a layout may become."""
        num_levels = self.num_levels((image.shape[2], image.shape[3]), layout)
        return self._sample(mip_pyramid(image.float(), num_levels), geometry)

    def num_levels(self, image_size: tuple[int, int], layout: Layout) -> int:
        """How many mip levels of an image ``(H, W)`` the patches of a layout may be read from."""
        stretch = 2 if self.localizer.crowd else 1  # see `divided`
        return num_mip_levels(stretch * self.transform.max_footprint(layout, image_size, self.patch_size), image_size)

    def _located(self, image: Tensor, look: Look, layout: Layout) -> PatchGeometry:
        """Where the patches of a layout lie in images that were looked at."""
        anchors, window = layout.anchors(image.device), look.window
        if window is not None:
            window = self._exposed(check_shape('the window of the localizer', window, (image.shape[0], 3)))
            anchors = anchors.within(window)
        if look.density is not None:
            if window is not None or not 0 < self.localizer.crowd <= MOST_CROWD:
                raise ValueError(
                    f'expected a localizer with a density to have no window, and a crowd within (0, {MOST_CROWD}], got '
                    f'{"one" if window is not None else "none"}, and {self.localizer.crowd}'
                )
            check_shape('the density of the localizer', look.density, (image.shape[0], *look.density.shape[-2:]))
            anchors = divided(layout, self._exposed_density(look.density))
        started = anchors if window is not None or look.density is not None else None
        parameters = self.localizer(look, anchors)
        for name, width in self.transform.fields.items():
            check_shape(f'{name} of the localizer', parameters.get(name), (image.shape[0], layout.num_patches, width))
        noise = None
        if self.training and self.jitter > 0:
            noise = self.jitter * torch.randn_like(parameters['shift'])
        geometry: PatchGeometry = self.transform(parameters, anchors, (image.shape[2], image.shape[3]), noise)
        return geometry._replace(saliency=look.saliency, window=window, started=started, logits=look.logits)

    def _sample(self, pyramid: list[Tensor], geometry: PatchGeometry) -> Tensor:
        image = pyramid[0]
        local = sample_grid(self.patch_size, image.device)
        jacobians = patch_jacobians(geometry, local)
        steps = footprint(jacobians, (image.shape[2], image.shape[3]), self.patch_size)
        return sample_patches(pyramid, geometry.points(local), steps)

    def _exposed_density(self, density: Tensor) -> Tensor:
        """The density of the anchors: a share follows what was seen, but for some images in train mode."""
        density = density / density.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        density = self._whole_at_times(density, torch.ones_like(density))
        return self.localizer.crowd * density + (1 - self.localizer.crowd)

    def _exposed(self, window: Tensor) -> Tensor:
        """The windows ``(B, 3)`` inside the image, but for noise and some images seen whole in train mode."""
        window = window_inside(window)
        if self.training and self.window_jitter > 0:
            window = shifted_window(window, self.window_jitter * torch.randn_like(window))
        return self._whole_at_times(window, vector_on(WHOLE, window.device))

    def _whole_at_times(self, seen: Tensor, whole: Tensor) -> Tensor:
        """What is seen of each image ``(B, ...)``, but for some in train mode, which are seen whole."""
        if not (self.training and self.whole_share > 0):
            return seen
        chosen = torch.rand([seen.shape[0], *[1] * (seen.dim() - 1)], device=seen.device) < self.whole_share
        return torch.where(chosen, whole, seen)

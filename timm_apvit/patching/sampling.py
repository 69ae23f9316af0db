"""Anti-aliased sampling of patches from a mip pyramid.

A patch that covers more source pixels than it has samples aliases under plain bilinear sampling, which also hides
from the localisation network what lies between its samples. Patches are therefore read from a mip pyramid (Williams
1983) at the level of their own pixel footprint, trilinearly. The image alone is read where shapes and bounds show that
no footprint exceeds one pixel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_apvit.patching.deterministic import grid_sample


def mip_level(footprint: Tensor) -> Tensor:
    """Level to read for a footprint in source pixels per sample; any shape.

    ``l - min(l, 1) / 2`` with ``l = max(0, log2(footprint))``. Half a level below the textbook's log2 is nearer to
    the true area average on photographs (RMS error 0.018 against 0.041 of the standard deviation at twice the pixels,
    0.044 against 0.092 at eight times), and for aligned grids at powers of two it is the exact area average.
    Continuous, 0 up to one pixel.
    """
    level = torch.log2(footprint.clamp(min=1.0))
    return level - 0.5 * level.clamp(max=1.0)


def num_mip_levels(max_footprint: float, image_size: tuple[int, int]) -> int:
    """How many levels footprints up to ``max_footprint`` can touch in an image ``(H, W)``; 1: no pyramid is needed."""
    tolerance = 1e-4  # a footprint of one pixel, but for rounding
    num, side, threshold = 1, 1, 1 + tolerance
    # Comparisons rather than a logarithm: a compiler must not tie what it compiles to the value of a rounded number.
    while max_footprint > threshold and side < max(image_size[0], image_size[1]):
        threshold = 2.0 ** (num + 0.5 + tolerance)  # above it `mip_level` exceeds ``num``
        num, side = num + 1, 2 * side
    return num


def _halve(level: Tensor) -> Tensor:
    """The next mip level: 2 x 2 averages; odd sides are extended by replication, so that no level drifts."""
    if level.shape[-2] % 2 == 1 or level.shape[-1] % 2 == 1:
        level = F.pad(level, [0, level.shape[-1] % 2, 0, level.shape[-2] % 2], mode='replicate')
    rows = level[..., ::2, :] + level[..., 1::2, :]  # slices take a third of avg_pool2d's time
    return (rows[..., ::2] + rows[..., 1::2]) * 0.25


def mip_pyramid(image: Tensor, num_levels: int) -> list[Tensor]:
    """The mip levels of an image: ``(B, C, H, W)`` -> level k of ``(B, C, ceil(H / 2^k), ceil(W / 2^k))``.

    Source pixel X lies at ``X / 2^k`` in level k.
    """
    levels = [image]
    for _ in range(1, num_levels):
        levels.append(_halve(levels[-1]))
    return levels


def _read(texture: Tensor, points: Tensor) -> Tensor:
    """Read a texture bilinearly: ``(B, C, h, w)``, ``(B, N, P_h, P_w, 2)`` -> ``(B, C, N, P_h, P_w)``.

    As one strip of ``N * P_h`` rows: expanding the image once a patch would take gigabytes.
    """
    grid = points.flatten(1, 2)
    # On CPU, grid_sample's backward ends the process at a position that is not a number.
    if points.requires_grad or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        grid = torch.nan_to_num(grid)
    strip = grid_sample(texture, grid)
    return strip.reshape(points.shape[0], texture.shape[1], *points.shape[1:4])


def sample_patches(pyramid: list[Tensor], points: Tensor, footprint: Tensor) -> Tensor:
    """Sample patches, anti-aliased: `mip_pyramid`, ``(B, N, P_h, P_w, 2)`` -> ``(B, N, C, P_h, P_w)``.

    Every level is read, rather than two of an atlas that holds them all: a level as coarse as a patch's footprint has
    about as many pixels as the patches have samples, so that copying the image into an atlas takes longer.

    Args:
        pyramid: of as many levels as `num_mip_levels` says, in the dtype of ``points`` (float32).
        points: (x, y) of every sample, normalised over pixel edges; outside the image its border pixels go on.
        footprint: source pixels per sample, for each patch or each sample: ``(B, N)`` or ``(B, N, P_h, P_w)``.
    """
    if footprint.dim() == 2:
        footprint = footprint.unsqueeze(-1).unsqueeze(-1)
    level = mip_level(footprint).unsqueeze(1)  # (B, 1, N, P_h | 1, P_w | 1)
    height, width = pyramid[0].shape[-2], pyramid[0].shape[-1]
    patches = _read(pyramid[0], points)
    for k in range(1, len(pyramid)):
        # How much of the image's sides a level has: all but for those that are no multiple of 2^k.
        ratio_w, ratio_h = width / (pyramid[k].shape[-1] << k), height / (pyramid[k].shape[-2] << k)
        at = points
        if ratio_w < 1 or ratio_h < 1:
            x, y = points[..., 0] * ratio_w + (ratio_w - 1), points[..., 1] * ratio_h + (ratio_h - 1)
            at = torch.stack([x, y], dim=1).movedim(1, -1)  # as planes, see `PatchGeometry.points`
        coarser, share = _read(pyramid[k], at), (level - (k - 1)).clamp(0.0, 1.0)
        if patches.requires_grad or coarser.requires_grad or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            patches = torch.lerp(patches, coarser, share)
        else:
            patches.add_(coarser.sub_(patches).mul_(share))  # in two thirds of the memory
    return patches.transpose(1, 2)

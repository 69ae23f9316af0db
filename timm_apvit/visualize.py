"""Pictures of where patches lie."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from timm_apvit.transforms import PatchGeometry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays apart for colour-blind readers, without its black.
PALETTE = ('#E69F00', '#56B4E9', '#009E73', '#F0E442', '#0072B2', '#D55E00', '#CC79A7')


def plot_patches(
    images: Tensor,
    geometry: PatchGeometry,
    titles: Sequence[str] | None = None,
    pairs_per_row: int = 2,
) -> 'Figure':
    """Draw images and patches: ``(B, C, H, W)`` -> B pairs, an image, and it with each patch's outline and centre.

    Convention:
        As on the screen: x points right and y points down, in pixels; (0, 0) is the image's top-left corner.

    Args:
        images: with values in [0, 1], of 1 or 3 channels.
        geometry: of these images.
        titles: one for each image.
        pairs_per_row: pairs side by side.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the shapes do not fit one another.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) < 1:
        raise ValueError(f'expected images of shape (B, 1 or 3, H, W), got {list(images.shape)}')
    if len(geometry.centres) != len(images):
        raise ValueError(f'expected the geometry of {len(images)} images, got that of {len(geometry.centres)}')
    if titles is not None and len(titles) != len(images):
        raise ValueError(f'expected {len(images)} titles, got {len(titles)}')
    try:
        from matplotlib.collections import LineCollection
        from matplotlib.figure import Figure
        from matplotlib.patheffects import withStroke
    except ModuleNotFoundError:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'timm-apvit[finetune]'") from None

    height, width = images.shape[-2:]
    # From [-1, 1] over pixel edges to pixels.
    size = torch.tensor([width, height]).double()
    outlines, centres = (
        (points.detach().double().cpu() + 1) / 2 * size for points in (geometry.outlines(), geometry.centres)
    )
    colours = [PALETTE[n % len(PALETTE)] for n in range(centres.shape[1])]
    pixels = images.detach().float().cpu().clamp(0, 1).permute(0, 2, 3, 1)
    pairs_per_row = min(pairs_per_row, len(images))
    rows = -(-len(images) // pairs_per_row)
    figure = Figure(figsize=(4 * pairs_per_row, rows * (2 * height / width + 0.3)), layout='constrained')
    axes = figure.subplots(rows, 2 * pairs_per_row, squeeze=False).reshape(-1, 2)
    for pair in axes[len(images) :].flat:
        pair.set_axis_off()
    line_width = 1.2 if outlines.shape[1] <= 64 else 0.6
    for n, pair in enumerate(axes[: len(images)]):
        for axis in pair:
            axis.imshow(pixels[n].numpy(), cmap='gray', vmin=0, vmax=1, extent=(0, width, height, 0))
            axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
        lines = LineCollection(list(outlines[n].numpy()), colors=colours, linewidths=line_width)
        # A dark rim keeps every colour visible on bright ground.
        lines.set_path_effects([withStroke(linewidth=2 * line_width, foreground='black')])
        pair[1].add_collection(lines)
        pair[1].scatter(*centres[n].T.numpy(), s=20 * line_width, c=colours, edgecolors='black', zorder=3)
        if titles is not None:
            pair[0].set_title(titles[n], fontsize=9, parse_math=False)
    return figure

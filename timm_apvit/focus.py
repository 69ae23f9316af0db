"""Focus: the anchors as a whole close in on the part of the image that matters.

A patch learns where to go from what it sees. Far from what matters it sees nothing that would tell it, so only the
patches nearby ever arrive. Here one saliency map moves all anchors together, as a window: its centre and its size are
the moments of the map, and a flat map is the whole image. The map is learnt from where the transformer attends
(`timm_apvit.finetuning.guidance`): on cluttered images 3,200 of them put nine windows of ten on the object.
"""

import torch
from torch import Tensor

from timm_apvit.coords import cell_centres

# The map is raised to this power before its moments are taken: attention has a floor that would pull them to the middle
# of the image.
SHARPNESS = 4.0
# Half-extents of the window, in those of an even map of the same spread. Above 1, so that a flat map is the whole image
# with room to spare, and that what matters lies within the window and not along its edge.
MARGIN = 2.5


def focus_window(saliency: Tensor, max_focus: float, sharpness: float = SHARPNESS, margin: float = MARGIN) -> Tensor:
    """Window around what matters: logits ``(B, h, w)`` -> centre (x, y) and half-extent, ``(B, 3)``.

    Moments of ``softmax(sharpness * saliency)``. The window lies in the image, and is never smaller than
    ``1 / max_focus``. No gradient reaches the map: through the sampling it is so noisy that it undoes what attention
    has taught.

    Convention:
        (x, y) and half-extents are normalised over pixel edges, as everywhere; the window has the image's aspect.

    Args:
        saliency: of cells that tile the image, unbounded; zero everywhere is the whole image.
        max_focus: above 1.
        sharpness: power to which the map is raised.
        margin: half-extents of the window in those of an even map of the same spread.
    """
    height, width = saliency.shape[1], saliency.shape[2]
    share = torch.softmax(sharpness * saliency.detach().float().flatten(1), dim=1).reshape(-1, height, width)
    columns, rows = share.sum(dim=1), share.sum(dim=2)  # (B, w), (B, h)
    x, spread_x = _moments(columns)
    y, spread_y = _moments(rows)
    extent = (margin * torch.sqrt((spread_x + spread_y) / 2)).clamp(min=1 / max_focus, max=1.0)
    room = 1 - extent
    return torch.stack(
        [torch.minimum(torch.maximum(x, -room), room), torch.minimum(torch.maximum(y, -room), room), extent], dim=1
    )


def _moments(share: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, relative to that of equal shares, of n cells along an axis: ``(B, n)`` -> two ``(B,)``.

    A share is spread evenly over its cell, so that equal shares of any n are the even map of [-1, 1], of variance 1/3.
    """
    index = torch.arange(share.shape[1], device=share.device, dtype=share.dtype)
    position = cell_centres(index, torch.full_like(index, share.shape[1]))
    mean = (share * position).sum(dim=1)
    variance = (share * (position - mean.unsqueeze(1)) ** 2).sum(dim=1) + 1 / (3 * share.shape[1] ** 2)
    return mean, 3 * variance

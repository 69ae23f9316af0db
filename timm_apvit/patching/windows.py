"""Windows: the part of an image that the anchors are laid over, and where the best one lies on a map of what matters.

Convention:
    A window is its centre (x, y) and its half-extent, ``(B, 3)``, normalised over pixel edges, as everywhere; it has
    the image's aspect.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_apvit.patching.anchors import Rows
from timm_apvit.patching.coords import vector_on
from timm_apvit.patching.geometry import inward_clamp

# The map is raised to this power first: it has a floor all over the image.
SHARPNESS = 2.0
# Half-extents of the windows that are compared. One that holds a share m of the map is worth m / extent^GAIN: an even
# map, of which a window holds extent^2, is worth most whole, and what is in one place in the smallest window.
EXTENTS = (0.75, 0.5, 0.35)
GAIN = 0.5
# The window that is the image.
WHOLE = (0.0, 0.0, 1.0)
# No window closes in by more than this, so that none is empty.
LARGEST_FOCUS = 1000.0


def best_window(saliency: Tensor, max_focus: float) -> Tensor:
    """The window that is worth most: ``(B, h, w)`` -> ``(B, 3)``.

    Those of `EXTENTS` that may be, in whole cells, are compared at all places with the whole image, which a flat map
    is. The centre is then the mean of what the best one holds. Nothing has a gradient here.

    Args:
        saliency: logits of cells that tile the image, ``(B, h, w)``.
        max_focus: no half-extent is below ``1 / max_focus``.
    """
    height, width = int(saliency.shape[1]), int(saliency.shape[2])
    share = torch.softmax(SHARPNESS * saliency.detach().float().flatten(1), dim=1).reshape(-1, height, width)
    points = Rows(height * width, height).anchors(share.device).centres.reshape(height, width, 2)
    best = vector_on(WHOLE, share.device).expand(share.shape[0], 3)
    most_worth = share.new_full(share.shape[:1], 1 + 1e-4)  # above what rounding makes of an even map
    for size in EXTENTS:
        rows, columns = (max(1, round(size * n)) for n in (height, width))
        extent = max(rows / height, columns / width)
        if extent * max_focus < 1 - 1e-6:
            continue
        held = F.avg_pool2d(share.unsqueeze(1), (rows, columns), 1) * (rows * columns)
        most, place = held.flatten(1).max(dim=1)
        row, column = torch.div(place, held.shape[3], rounding_mode='floor'), place % held.shape[3]
        x, y = (2 * column + columns) / width - 1, (2 * row + rows) / height - 1
        worth = most / extent**GAIN
        better = (worth > most_worth).unsqueeze(1)
        best = torch.where(better, torch.stack([x, y, torch.full_like(x, extent)], dim=1), best)
        most_worth = torch.maximum(worth, most_worth)
    inside = ((points - best[:, None, None, :2]).abs() <= best[:, None, None, 2:]).all(dim=-1)
    held = (share * inside).unsqueeze(-1)
    mean = (held * points).sum(dim=(1, 2)) / held.sum(dim=(1, 2))
    return window_inside(torch.cat([mean, best[:, 2:]], dim=1))


def shifted_window(window: Tensor, change: Tensor) -> Tensor:
    """Shift windows by some of their half-extents and scale them by an exponent: two ``(B, 3)`` -> ``(B, 3)``.

    The whole image stays whole.
    """
    extent = window[:, 2:]
    change = change * (extent < 1)
    centre = window[:, :2] + extent * change[:, :2]
    return window_inside(torch.cat([centre, extent * torch.exp(change[:, 2:])], dim=1))


def window_inside(window: Tensor) -> Tensor:
    """Put windows ``(B, 3)`` wholly inside the image, none smaller than ``1 / LARGEST_FOCUS``."""
    extent = window[:, 2:]
    least = torch.full_like(extent, 1 / LARGEST_FOCUS)
    extent = inward_clamp(extent, least, torch.ones_like(extent))
    room = (1 - extent).expand(-1, 2)
    return torch.cat([inward_clamp(window[:, :2], -room, room), extent], dim=1)

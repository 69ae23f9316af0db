"""Focus: the anchors as a whole close in on the part of the image that matters.

A patch learns where to go from what it sees. Far from what matters it sees nothing that would tell it, so only the
patches nearby ever arrive. Here all anchors move together, as a window, in two steps: a saliency map says where the
window lies, and the features under it then say by how much to shift and resize it. A flat map is the whole image. How
the two are learnt, from labels and from where the transformer attends, is `timm_apvit.finetuning.guidance`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_apvit.patching.coords import cell_centres, check_number, sample_grid
from timm_apvit.patching.deterministic import grid_sample
from timm_apvit.patching.geometry import inward_clamp
from timm_apvit.patching.layers import Linear, ScaleKeeping, ZeroLinear, conv_norm_act

# The map is raised to this power before its moments are taken: attention has a floor that would pull them to the middle
# of the image.
SHARPNESS = 4.0
# Half-extents of the window, in those of an even map of the same spread. Above 1, so that a flat map is the whole image
# with room to spare, and that what matters lies within the window and not along its edge.
MARGIN = 2.5
# The map alone closes in by this factor at most: it knows better where something is than how large it is.
STEP = 2.5
# Its window may then be shifted by so many of its half-extents, and grow or shrink by so much.
MAX_SHIFT, MAX_ZOOM = 0.5, 2.0
# So no window closes in by more than this.
LARGEST_FOCUS = STEP * MAX_ZOOM
# From this half-extent on a window counts as the whole image.
WHOLE = 0.9


class Focus(NamedTuple):
    """Where a batch of images was looked at.

    Attributes:
        saliency: logits of what matters, ``(B, h, w)``, of cells that tile the image.
        summary: features under the saliency map, ``(B, D)``: what it selects.
        rough: window of the saliency map alone: centre (x, y) and half-extent, ``(B, 3)``.
        adjustment: shift (x, y) in half-extents of ``rough`` and log-scale, ``(B, 3)``.
        window: the adjusted one, ``(B, 3)``.
    """

    saliency: Tensor
    summary: Tensor
    rough: Tensor
    adjustment: Tensor
    window: Tensor


class FocusNetwork(ScaleKeeping):
    """What the localisation network saw -> `Focus`.

    The window is found in two steps, as in detection (Ren et al. 2015, https://arxiv.org/abs/1506.01497): the moments
    of a saliency map, then an adjustment from features read on a grid over that first window. Both last layers are
    zero: the whole image.

    Args:
        width: channels of the features.
        max_focus: above 1 and at most `LARGEST_FOCUS`; no half-extent is below ``1 / max_focus``.
        points: features read along each side of the first window.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, width: int, max_focus: float, points: int = 6, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        factory: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.width, self.points = width, points
        self.max_focus = check_number('max_focus', max_focus, 1, LARGEST_FOCUS)
        # A bias would move all cells alike, and change nothing.
        last = ZeroLinear(width, 1, bias=False, **factory)
        self.saliency = nn.Sequential(conv_norm_act(width, width, 1, factory), last)
        self.reduce = Linear(width, width // 2, **factory)
        self.adjust = nn.Sequential(
            Linear(points**2 * (width // 2) + width, 2 * width, **factory),
            nn.GELU(),
            Linear(2 * width, width, **factory),
            nn.GELU(),
            ZeroLinear(width, 3, **factory),
        )
        self.init_weights()

    def forward(self, features: Tensor, context: Tensor) -> Focus:
        """Find the window, from features ``(B, D, h, w)`` and the context of the whole image, ``(B, 1, D)``."""
        hidden = features + context.transpose(1, 2).unsqueeze(-1)
        seen: Tensor = self.saliency[0](hidden)
        saliency: Tensor = self.saliency[1](seen.movedim(1, -1)).squeeze(-1).float()  # (B, h, w)
        share = torch.softmax(saliency.flatten(1), dim=1).unsqueeze(1)
        # Products and sums rather than a matrix product, which autocast would round.
        summary = (hidden.flatten(2).float() * share).sum(dim=2)  # (B, D)

        rough = saliency_window(saliency, min(self.max_focus, STEP))
        local = sample_grid((self.points, self.points), features.device)
        grid = rough[:, None, None, :2] + rough[:, None, None, 2:] * local
        # Beyond the image lies nothing: zeros say where it ends.
        under = grid_sample(features.float(), grid, 'zeros')
        under = self.reduce(under.flatten(2).transpose(1, 2).to(features.dtype)).flatten(1)
        adjustment = torch.tanh(self.adjust(torch.cat([under, context.squeeze(1)], dim=1)).float())
        adjustment = torch.cat([adjustment[:, :2] * MAX_SHIFT, adjustment[:, 2:] * math.log(MAX_ZOOM)], dim=1)
        # The map gets no gradient, but a zero: DistributedDataParallel waits for one from every parameter.
        window = adjusted_window(rough, adjustment, self.max_focus) + 0 * saliency.mean()
        return Focus(saliency, summary, rough, adjustment, window)


def focus_of(localizer: nn.Module) -> FocusNetwork | None:
    """The network of this module that finds the window of a localiser; None: it has none."""
    focus = getattr(localizer, 'focus', None)
    return focus if isinstance(focus, FocusNetwork) else None


def saliency_window(saliency: Tensor, max_focus: float) -> Tensor:
    """Window around what matters: logits ``(B, h, w)`` -> centre (x, y) and half-extent, ``(B, 3)``.

    Moments of ``softmax(SHARPNESS * saliency)``. The window lies in the image, and is never smaller than
    ``1 / max_focus``. No gradient reaches the map: through the sampling it is so noisy that it undoes what the map has
    learnt.

    Convention:
        (x, y) and half-extents are normalised over pixel edges, as everywhere; the window has the image's aspect.

    Args:
        saliency: of cells that tile the image, unbounded; zero everywhere is the whole image.
        max_focus: above 1.
    """
    height, width = saliency.shape[1], saliency.shape[2]
    share = torch.softmax(SHARPNESS * saliency.detach().float().flatten(1), dim=1).reshape(-1, height, width)
    x, spread_x = _moments(share.sum(dim=1))  # of the columns
    y, spread_y = _moments(share.sum(dim=2))
    extent = MARGIN * torch.sqrt((spread_x + spread_y) / 2)
    return window_inside(torch.stack([x, y, extent], dim=1), max_focus)


def adjusted_window(rough: Tensor, adjustment: Tensor, max_focus: float) -> Tensor:
    """`shifted_window`, but the whole image is not adjusted, and what is almost the whole image hardly."""
    return shifted_window(rough, adjustment * ((1 - rough[:, 2:]) / (1 - WHOLE)).clamp(max=1.0), max_focus)


def shifted_window(window: Tensor, change: Tensor, max_focus: float) -> Tensor:
    """Shift windows by some of their half-extents and scale them by an exponent: two ``(B, 3)`` -> ``(B, 3)``."""
    extent = window[:, 2:]
    centre = window[:, :2] + extent * change[:, :2]
    return window_inside(torch.cat([centre, extent * torch.exp(change[:, 2:])], dim=1), max_focus)


def window_inside(window: Tensor, max_focus: float) -> Tensor:
    """Put windows ``(B, 3)`` wholly inside the image, none smaller than ``1 / max_focus``."""
    extent = window[:, 2:]
    least = torch.full_like(extent, 1 / max_focus)
    extent = inward_clamp(extent, least, torch.ones_like(extent))
    room = (1 - extent).expand(-1, 2)
    return torch.cat([inward_clamp(window[:, :2], -room, room), extent], dim=1)


def _moments(share: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, relative to that of equal shares, of n cells along an axis: ``(B, n)`` -> two ``(B,)``.

    A share is spread evenly over its cell, so that equal shares of any n are the even map of [-1, 1], of variance 1/3.
    """
    index = torch.arange(share.shape[1], device=share.device, dtype=share.dtype)
    position = cell_centres(index, torch.full_like(index, share.shape[1]))
    mean = (share * position).sum(dim=1)
    variance = (share * (position - mean.unsqueeze(1)) ** 2).sum(dim=1) + 1 / (3 * share.shape[1] ** 2)
    return mean, 3 * variance

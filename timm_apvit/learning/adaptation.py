"""Does it adapt? How far patches have moved from the fixed grid, in figures that a log can have."""

import math
from typing import Any

import torch
from torch import Tensor

from timm_apvit.models.mixin import APViT, check_apvit, in_eval_mode

# Patches whose figures are all below these are those of the fixed grid.
STILL = {'patch_shift': 0.02, 'patch_zoom': 0.02, 'patch_turn': 1.0}


@torch.no_grad()
def adaptation(model: APViT, images: Tensor) -> dict[str, float]:
    """How far the patches of images ``(B, C, H, W)`` lie from a fixed grid, in eval mode.

    Returns:
        Means over patches and images: ``patch_shift``, of the centre in half-extents of its cell; ``patch_zoom``, the
        factor of its size to that of a cell of the grid, larger or smaller, less 1; ``patch_turn``, in degrees. Of a
        model with windows also ``window_size``, the mean half-extent, and ``window_whole``, the share of images that
        are seen whole; patches are then compared with the grid in the window.

    Raises:
        ValueError: a model that is no APViT.
    """
    check_apvit(model)
    with in_eval_mode(model):
        seen = model.patch_embed(images)
    geometry, anchors = seen.geometry, seen.layout.anchors(images.device)
    moved = (geometry.moves(anchors) / anchors.extents).norm(dim=-1)
    zoomed = (geometry.in_layout(anchors)[1] / anchors.extents).log().abs().mean(dim=-1)
    found = {
        'patch_shift': float(moved.mean()),
        'patch_zoom': math.expm1(float(zoomed.mean())),
        'patch_turn': math.degrees(float(geometry.rotation.abs().mean())),
    }
    window: Any = geometry.window
    if window is not None:
        found['window_size'] = float(window[:, 2].mean())
        found['window_whole'] = float((window[:, 2] == 1).float().mean())
    return found


def stood_still(figures: dict[str, float]) -> bool:
    """Whether figures of `adaptation` are those of a fixed grid over the whole image."""
    return figures.get('window_whole', 1.0) == 1 and all(figures[name] < least for name, least in STILL.items())

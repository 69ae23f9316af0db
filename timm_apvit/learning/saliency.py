"""Teach a glance where to look, for tasks whose labels say where: masks, boxes, points."""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_apvit.patching.geometry import PatchGeometry


def saliency_loss(geometry: PatchGeometry, target: Tensor) -> Tensor:
    """Cross-entropy between where a localiser looks and where it should, over the places of an image; the batch's mean.

    Args:
        geometry: of a forward; `timm_apvit.models.attention.calls_of` catches that of ``model.patch_embed``.
        target: how much each cell of a grid of any size matters, at least 0, ``(B, h, w)``. An image without anything
            that does teaches nothing.

    Raises:
        ValueError: a localiser that does not say where it looks, or a target of another shape, below 0 or not finite.

    Example:
        >>> import timm, timm_apvit, torch
        >>> model = timm.create_model('test_apvit', localizer={'name': 'glance', 'select': 14}, num_patches=49)
        >>> target = torch.zeros(2, 20, 20)
        >>> target[:, 5:10, 5:10] = 1.0
        >>> saliency_loss(model.patch_geometry(torch.randn(2, 3, 160, 160)), target).backward()
    """
    saliency = geometry.saliency
    if saliency is None:
        raise ValueError("expected a localizer that says where it looks, such as 'glance', got one that does not")
    if target.dim() != 3 or len(target) != len(saliency):
        raise ValueError(f'expected a target ({len(saliency)}, h, w), got {tuple(target.shape)}')
    if not ((target >= 0) & target.isfinite()).all():
        raise ValueError('expected a target of finite numbers of at least 0, got others')
    wanted = F.adaptive_avg_pool2d(target.unsqueeze(1).float(), (saliency.shape[1], saliency.shape[2])).flatten(1)
    total = wanted.sum(dim=1, keepdim=True)
    each = -(wanted / total.clamp(min=1e-12) * torch.log_softmax(saliency.flatten(1), dim=1)).sum(dim=1)
    return each.sum() / (total > 0).sum().clamp(min=1)

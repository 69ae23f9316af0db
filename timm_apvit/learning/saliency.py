"""Teach a glance where to look, for tasks whose labels say where: masks, boxes, points."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_apvit.learning.glance import fit_evidence, glance_of
from timm_apvit.models.glance import saliency_of
from timm_apvit.models.mixin import APViT
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
        >>> model = timm.create_model('test_apvit', localizer={'name': 'glance', 'crowd': 0.6}, num_patches=64)
        >>> target = torch.zeros(2, 20, 20)
        >>> target[:, 5:10, 5:10] = 1.0
        >>> saliency_loss(model.patch_geometry(torch.randn(2, 3, 160, 160)), target).backward()
    """
    saliency = geometry.saliency if isinstance(geometry, PatchGeometry) else None
    if saliency is None:
        got = 'one that does not' if isinstance(geometry, PatchGeometry) else type(geometry).__name__
        raise ValueError(f"expected a geometry of a localizer that says where it looks, such as 'glance', got {got}")
    shares = _shares(target, len(saliency), (saliency.shape[1], saliency.shape[2]))
    return _cross_entropy(saliency.flatten(1), shares.to(saliency.device))


def fit_saliency(
    model: APViT,
    batches: Iterable[tuple[Tensor, Tensor]],
    epochs: int = 20,
    lr: float = 2e-3,
    most_images: int = 20_000,
) -> float:
    """As `timm_apvit.fit_glance`, by where things are: a head start for `saliency_loss`.

    Args:
        model: with ``localizer='glance'`` and pretrained weights; trained in place, where it is.
        batches: images ``(B, C, H, W)`` of one size, and targets ``(B, h, w)`` as of `saliency_loss`, over what the
            patches tile.
        epochs: over the glances.
        lr: the highest learning rate; it rises and falls once.
        most_images: further ones are left out.

    Returns:
        The mean loss of the last epoch.

    Raises:
        ValueError: as `fit_glance` and `saliency_loss`.
    """
    localizer = glance_of(model)

    def reduced() -> Iterator[tuple[Tensor, Tensor]]:
        for images, target in batches:
            canvas = model.patch_embed.on_canvas(images)
            grid = localizer.layout((canvas.shape[2], canvas.shape[3])).grids[0].grid
            yield images, _shares(target, len(images), grid)

    def loss(evidence: Tensor, shares: Tensor) -> Tensor:
        return _cross_entropy(saliency_of(evidence), shares)

    return fit_evidence(model, reduced(), loss, epochs, lr, most_images)


def _shares(target: Tensor, number: int, grid: tuple[int, int]) -> Tensor:
    """How much of what matters is in each place of a grid, ``(B, h * w)``, of sum 1, or 0 where nothing does."""
    if not isinstance(target, Tensor) or target.dim() != 3 or len(target) != number or not target[:1].numel():
        got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f'expected a target ({number}, h, w), got {got}')
    if not ((target >= 0) & target.isfinite()).all():
        raise ValueError('expected a target of finite numbers of at least 0, got others')
    target = target.unsqueeze(1).float()
    target = target / target.amax(dim=(2, 3), keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    wanted = F.adaptive_avg_pool2d(target, grid).flatten(1)
    return wanted / wanted.sum(dim=1, keepdim=True).clamp(min=1e-30)


def _cross_entropy(saliency: Tensor, shares: Tensor) -> Tensor:
    """Of logits and shares ``(B, places)``, the mean of the images in which something matters."""
    each = -(shares * torch.log_softmax(saliency, dim=1)).sum(dim=1)
    return each.sum() / (shares.sum(dim=1) > 0).sum().clamp(min=1)

"""Teach a localiser where to look, for tasks whose labels say where: masks, boxes, points."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from timm_apvit.learning.fitting import fit_parameters, learning_parameters, pyramids
from timm_apvit.models.mixin import APViT, check_apvit, in_eval_mode
from timm_apvit.patching.anchors import common_lengths
from timm_apvit.patching.geometry import PatchGeometry
from timm_apvit.patching.warps import exact_product


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
        >>> model = timm.create_model('test_apvit', localizer='saliency', num_patches=64)
        >>> target = torch.zeros(2, 20, 20)
        >>> target[:, 5:10, 5:10] = 1.0
        >>> saliency_loss(model.patch_geometry(torch.randn(2, 3, 160, 160)), target).backward()
    """
    if not isinstance(geometry, PatchGeometry):
        raise ValueError(f'expected a geometry, as of model.patch_geometry, got {type(geometry).__name__}')
    return _cross_entropy(geometry.saliency, target)


class Batches(Protocol):
    """Batches of images and targets that have a length and come again, such as a DataLoader."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


def fit_saliency(model: APViT, batches: Batches, epochs: int = 2, lr: float = 2e-3) -> float:
    """Fit the localiser by where things are, before the model is trained as a whole: a head start for `saliency_loss`.

    Where several processes train, each is to see the same batches, or to take the model of one of them afterwards.

    Args:
        model: whose localiser says where it looks; trained in place, where it is, the localiser alone.
        batches: such as a DataLoader's: images ``(B, C, H, W)``, and targets ``(B, h, w)`` as of `saliency_loss`, over
            what the patches tile.
        epochs: over the batches.
        lr: the highest learning rate; it rises and falls once.

    Returns:
        The mean loss of the last epoch.

    Raises:
        ValueError: as `saliency_loss`; a model in float16 or frozen, epochs below 1, or no images: nothing is learnt.
    """
    check_apvit(model)
    localizer = model.patch_embed.patching.localizer
    parameters = learning_parameters(localizer)
    try:
        steps = len(batches)
    except TypeError:
        got = type(batches).__name__
        raise ValueError(
            f'expected batches that have a length and come again, such as a DataLoader of a dataset, got {got}'
        ) from None

    def losses() -> Iterator[Tensor]:
        for pyramid, target in pyramids(model, batches):
            yield _cross_entropy(localizer.look(pyramid).saliency, target)

    with in_eval_mode(model):
        return fit_parameters(parameters, losses, steps, epochs, lr)


def _shares(target: Tensor, number: int, grid: tuple[int, int]) -> Tensor:
    """How much of what matters is in each place of a grid, ``(B, h * w)``, of sum 1, or 0 where nothing does."""
    if not isinstance(target, Tensor) or target.dim() != 3 or len(target) != number or 0 in target.shape[1:]:
        got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f'expected a target ({number}, h, w), got {got}')
    if not ((target >= 0) & target.isfinite()).all():
        raise ValueError('expected a target of finite numbers of at least 0, got others')
    target = target.float()
    target = target / target.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    down, across = (
        common_lengths(length, own, target.device).float() for length, own in zip(grid, target.shape[1:], strict=True)
    )
    wanted = exact_product(exact_product(down, target), across.T).flatten(1)
    return wanted / wanted.sum(dim=1, keepdim=True).clamp(min=1e-30)


def _cross_entropy(saliency: Tensor | None, target: Tensor) -> Tensor:
    """Cross-entropy of logits ``(B, h, w)`` and a target, the mean of the images in which something matters."""
    if saliency is None:
        raise ValueError("expected a localizer that says where it looks, such as 'saliency', got one that does not")
    shares = _shares(target, len(saliency), (saliency.shape[1], saliency.shape[2])).to(saliency.device)
    each = -(shares * torch.log_softmax(saliency.flatten(1), dim=1)).sum(dim=1)
    return each.sum() / (shares.sum(dim=1) > 0).sum().clamp(min=1)

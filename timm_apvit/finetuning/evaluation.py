"""Accuracy and loss on the test data, at each budget."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from timm_apvit.finetuning.data import Splits, create_batches
from timm_apvit.finetuning.distributed import own_share, sum_over_processes
from timm_apvit.finetuning.parsing import Budget, count, format_budget
from timm_apvit.models.mixin import APViT


class Scores(NamedTuple):
    """How well a model does.

    Attributes:
        loss: mean cross entropy.
        top1: accuracy in [0, 1].
        top5: share of the images, in [0, 1], whose class is among the five (or all, if fewer) most likely ones.
        images: that were seen.
    """

    loss: float
    top1: float
    top5: float
    images: int


def evaluate(model: nn.Module, splits: Splits, batch_size: int, workers: int = 0, amp: str | None = None) -> Scores:
    """How well a model does on the test data, which all processes share.

    Args:
        model: is in eval mode afterwards.
        splits: of which the test data are used.
        batch_size: of this process.
        workers: processes that load data.
        amp: ``'bfloat16'``, ``'float16'`` or None for float32.

    Raises:
        RuntimeError: there are no test images, which a stream tells only now.
    """
    device = next(model.parameters()).device
    model.eval()
    sums = torch.zeros(4, device=device)  # loss, right, among the first five, images
    with torch.inference_mode():
        for images, labels in create_batches(splits.test, 0, batch_size, workers=workers, share=own_share()):
            with autocast(device, amp):
                logits = model(images.to(device, non_blocking=True)).float()
            targets = labels.to(device, non_blocking=True)
            found = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            sums[0] += F.cross_entropy(logits, targets, reduction='sum')
            sums[1] += found[:, 0].sum()
            sums[2] += found.sum()
            sums[3] += len(targets)
        loss, top1, top5, number = sum_over_processes(sums).tolist()
    if not number:
        raise RuntimeError('expected test images, got none')
    return Scores(loss / number, top1 / number, top5 / number, int(number))


def evaluate_budgets(
    model: nn.Module,
    splits: Splits,
    budgets: Sequence[Budget],
    batch_size: int,
    workers: int = 0,
    amp: str | None = None,
) -> dict[str, float]:
    """`evaluate` at each of several budgets, of which the largest is set afterwards.

    Returns:
        ``test_loss`` and ``test_top1``, their means over the budgets; with several budgets also ``test_loss_N`` and
        ``test_top1_N`` for each N or GHxGW. A model that has no budgets is evaluated as it is.
    """
    if not isinstance(model, APViT) or len(budgets) < 2:
        scores = evaluate(model, splits, batch_size, workers, amp)
        return {'test_loss': scores.loss, 'test_top1': scores.top1}
    metrics = {}
    for budget in sorted(budgets, key=count):
        model.set_num_patches(budget)
        scores = evaluate(model, splits, batch_size, workers, amp)
        metrics[f'test_loss_{format_budget(budget)}'] = scores.loss
        metrics[f'test_top1_{format_budget(budget)}'] = scores.top1
    means = {
        key: sum(value for name, value in metrics.items() if name.startswith(key)) / len(budgets)
        for key in ('test_loss', 'test_top1')
    }
    return {**means, **metrics}


def autocast(device: torch.device, amp: str | None) -> AbstractContextManager[object]:
    """Compute in the data type named, where that is safe; None: in float32."""
    dtype = None if amp is None else getattr(torch, amp)
    return torch.autocast(device.type, dtype=dtype, enabled=amp is not None)

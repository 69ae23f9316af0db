"""What a model is worth: accuracy and loss on test data at each budget, multiply-adds, and speed."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_apvit.finetuning.samples import WHOLE, BatchSplit, Splits
from timm_apvit.finetuning.values import Budget, count, format_budget
from timm_apvit.models.mixin import APViT
from timm_apvit.results import metric_in

SECONDS = 1.0  # that each speed is measured for, at least


def evaluate(
    model: nn.Module,
    splits: Splits,
    batch_size: int,
    workers: int = 0,
    amp: str | None = None,
    split: BatchSplit = WHOLE,
    each: Callable[[Tensor, Tensor], None] | None = None,
) -> dict[str, float]:
    """How well a model does on the test data, which all processes share, by timm's evaluator.

    Args:
        model: is in eval mode afterwards.
        splits: of which the test data are used.
        batch_size: of this process.
        workers: processes that load data.
        amp: ``'bfloat16'``, ``'float16'`` or None for float32.
        split: of the images among processes.
        each: is called with the logits ``(B, classes)`` and the labels of each batch.

    Returns:
        ``loss``, the mean cross entropy, and in [0, 1] ``top1`` and of more than five classes ``top5``; with several
        labels to an image that of each class, and ``map``, the mean average precision of the classes, and ``micro_f1``,
        ``macro_f1`` and ``sample_f1``. ``images``, that were seen.
    """
    device = next(model.parameters()).device
    evaluator = (MultiLabelClassificationEvaluator if splits.multi_label else ClassificationEvaluator)(device)
    model.eval()
    with torch.inference_mode():
        for images, labels in splits.test.test_batches(batch_size, workers, split):
            with autocast(device, amp):
                logits = model(images.to(device, non_blocking=True)).float()
            targets = labels.to(device, non_blocking=True)
            evaluator.update(logits, targets)
            if each is not None:
                each(logits, targets)
        found = evaluator.compute(distributed=split.world > 1)
        seen = torch.tensor(evaluator.num_samples, device=device)
        if split.world > 1:
            torch.distributed.all_reduce(seen)
    if not seen:
        raise RuntimeError('expected test images, got none')
    if len(splits.label_names) <= 5:
        found.pop('top5', None)
    return {**{key: value if key == 'loss' else value / 100 for key, value in found.items()}, 'images': int(seen)}


def evaluate_budgets(
    model: nn.Module, splits: Splits, budgets: Sequence[Budget], *args: Any, **kwargs: Any
) -> dict[str, float]:
    """`evaluate` at each of several budgets, of which the largest is set afterwards; further arguments are its own.

    Returns:
        ``test_loss`` and ``test_top1``, or ``test_map``, their means over the budgets; with several budgets also
        ``test_loss_N`` and ``test_top1_N`` for each N or GHxGW. A model without budgets is evaluated as it is.
    """
    if not isinstance(model, APViT) or len(budgets) < 2:
        found = evaluate(model, splits, *args, **kwargs)
        return {f'test_{key}': found[key] for key in ('loss', metric_in(found))}
    by_budget = {}
    for budget in sorted(budgets, key=count):
        model.set_num_patches(budget)
        found = by_budget[format_budget(budget)] = evaluate(model, splits, *args, **kwargs)
    keys = ('loss', metric_in(found))
    means = {f'test_{key}': sum(each[key] for each in by_budget.values()) / len(budgets) for key in keys}
    return means | {f'test_{key}_{name}': each[key] for name, each in by_budget.items() for key in keys}


def autocast(device: torch.device, amp: str | None) -> AbstractContextManager[object]:
    """Compute in the data type named, where that is safe; None: in float32."""
    dtype = None if amp is None else getattr(torch, amp)
    return torch.autocast(device.type, dtype=dtype, enabled=amp is not None)


def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of a forward: of matrix products, convolutions and attention, as torch's own counter has them."""
    # On the CPU that counter does not know fused attention.
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images)
    return int(counter.get_total_flops()) // 2


def images_per_second(forward: Callable[[], Any], images: int, seconds: float | None = None) -> float:
    """Speed of a forward of so many images: of the median of runs of ``seconds`` in all, after a warm-up."""
    # It tells of a CUDA_HOME where there is no GPU.
    logging.getLogger('torch.utils.cpp_extension').setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    timer = Timer('forward()', globals={'forward': forward}, num_threads=torch.get_num_threads())
    timing = timer.blocked_autorange(min_run_time=SECONDS if seconds is None else seconds)
    return images / float(timing.median)

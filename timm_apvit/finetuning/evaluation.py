"""What a model is worth: accuracy and loss on test data at each budget, multiply-adds, and speed."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_apvit.finetuning.batches import Division, Splits, batches_to_test
from timm_apvit.finetuning.values import Budget, count, format_budget
from timm_apvit.models.mixin import APViT

SECONDS = 1.0  # that each speed is measured for, at least


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


def evaluate(
    model: nn.Module,
    splits: Splits,
    batch_size: int,
    workers: int = 0,
    amp: str | None = None,
    division: Division = Division(),  # noqa: B008  immutable
    look: Callable[[Tensor, Tensor], None] | None = None,
) -> Scores:
    """How well a model does on the test data, which all processes share.

    Args:
        model: is in eval mode afterwards.
        splits: of which the test data are used.
        batch_size: of this process.
        workers: processes that load data.
        amp: ``'bfloat16'``, ``'float16'`` or None for float32.
        division: of the images among processes.
        look: is shown the logits ``(B, classes)`` and the labels ``(B,)`` of each batch.

    Raises:
        RuntimeError: there are no test images, which a stream tells only now.
    """
    device = next(model.parameters()).device
    evaluator = ClassificationEvaluator(device)
    model.eval()
    with torch.inference_mode():
        for images, labels in batches_to_test(splits.test, batch_size, workers, division):
            with autocast(device, amp):
                logits = model(images.to(device, non_blocking=True)).float()
            targets = labels.to(device, non_blocking=True)
            evaluator.update(logits, targets)
            if look is not None:
                look(logits, targets)
        found = evaluator.compute(distributed=division.world > 1)
        seen = torch.tensor(evaluator.num_samples, device=device)
        if division.world > 1:
            torch.distributed.all_reduce(seen)
    if not seen:
        raise RuntimeError('expected test images, got none')
    return Scores(found['loss'], found['top1'] / 100, found['top5'] / 100, int(seen))


def evaluate_budgets(
    model: nn.Module, splits: Splits, budgets: Sequence[Budget], *args: Any, **kwargs: Any
) -> dict[str, float]:
    """`evaluate` at each of several budgets, of which the largest is set afterwards; further arguments are its own.

    Returns:
        ``test_loss`` and ``test_top1``, their means over the budgets; with several budgets also ``test_loss_N`` and
        ``test_top1_N`` for each N or GHxGW. A model that has no budgets is evaluated as it is.
    """
    if not isinstance(model, APViT) or len(budgets) < 2:
        scores = evaluate(model, splits, *args, **kwargs)
        return {'test_loss': scores.loss, 'test_top1': scores.top1}
    metrics = {}
    for budget in sorted(budgets, key=count):
        model.set_num_patches(budget)
        scores = evaluate(model, splits, *args, **kwargs)
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


def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of a forward: of matrix products, convolutions and attention, as torch's own counter has them."""
    # On the CPU that counter does not know fused attention.
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images)
    return int(counter.get_total_flops()) // 2


def images_per_second(forward: Callable[[], Any], images: int, seconds: float | None = None) -> float:
    """Speed of a forward of so many images: of the median of runs of ``seconds`` in all, after a warm-up."""
    from torch.utils.benchmark import Timer

    timer = Timer('forward()', globals={'forward': forward}, num_threads=torch.get_num_threads())
    timing = timer.blocked_autorange(min_run_time=SECONDS if seconds is None else seconds)
    return images / float(timing.median)

"""What a training minimises, and how its images are mixed and drawn: settings -> timm's task, mixup, weights."""

from typing import Any

import torch
from timm.data import Mixup
from timm.task import ClassificationTask, MultiLabelClassificationTask
from torch import Tensor, nn

from timm_apvit.finetuning.samples import Splits
from timm_apvit.finetuning.settings import Settings
from timm_apvit.learning.distillation import DistillationTask, DistillationWeights, Teacher


class WeightedCrossEntropy(nn.CrossEntropyLoss):
    """Cross entropy by class weights, whose mean is over the images, so that micro-batches add up to the batch."""

    def __init__(self, weight: Tensor, smoothing: float) -> None:
        super().__init__(weight, reduction='none', label_smoothing=smoothing)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits ``(B, classes)`` and labels ``(B,)`` -> the loss."""
        return super().forward(input, target).mean()


def create_mixup(settings: Settings, num_classes: int) -> Any:
    """Timm's mixup and cutmix, which smooth the labels themselves; None: neither is wanted."""
    if not (settings.mixup or settings.cutmix):
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        prob=settings.mixup_prob,
        label_smoothing=settings.smoothing,
        num_classes=num_classes,
        multi_label=settings.multi_label,
    )


def create_task(
    model: nn.Module,
    settings: Settings,
    splits: Splits,
    device: torch.device,
    teacher: tuple[Teacher, DistillationWeights] | None = None,
) -> ClassificationTask:
    """Timm's task: the cross entropy of the labels, and the terms of a teacher if there is one."""
    kwargs: dict[str, Any] = {'device': device, 'verbose': False}
    if settings.class_weights == 'balanced':
        counts = class_counts(splits)
        weight = torch.where(counts > 0, counts.sum() / (len(counts) * counts.clamp(min=1)), 0)
        kwargs['criterion'] = WeightedCrossEntropy(weight, settings.smoothing)
    else:
        mixes = bool(settings.mixup or settings.cutmix)
        kwargs['criterion_kwargs'] = {'smoothing': settings.smoothing, 'soft_targets': mixes}
    if splits.multi_label:
        return MultiLabelClassificationTask(model, **kwargs)
    if teacher is None:
        return ClassificationTask(model, **kwargs)
    return DistillationTask(model, teacher[0].to(device), teacher[1], **kwargs)


def sample_weights(settings: Settings, splits: Splits) -> Tensor | None:
    """Weights of the training images by which all classes are drawn equally often; None: that is not wanted."""
    if not settings.balanced_sampling:
        return None
    return (1 / class_counts(splits))[torch.tensor(splits.train.known_labels)]


def check_labels(settings: Settings, splits: Splits) -> None:
    """Raise ValueError if labels are needed that only reading all images would tell."""
    if settings.class_weights == 'balanced' or settings.balanced_sampling:
        class_counts(splits)


def class_counts(splits: Splits) -> Tensor:
    """How many training images each class has, ``(classes,)``; ValueError if only reading all of them would tell."""
    labels = splits.train.known_labels
    if labels is None:
        expected = 'images that have one label each, and say which'
        raise ValueError(f'expected {expected}, with --class-weights or --balanced-sampling, got other data')
    return torch.tensor(labels).bincount(minlength=len(splits.label_names)).float()

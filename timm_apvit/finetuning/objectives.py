"""What a training minimises, and how its images are mixed and drawn: settings -> timm's task, mixup, weights."""

from typing import Any

import torch
from timm.data import Mixup
from timm.task import ClassificationTask
from torch import Tensor, nn

from timm_apvit.finetuning.batches import Splits
from timm_apvit.finetuning.samples import SeededSamples
from timm_apvit.finetuning.settings import Settings
from timm_apvit.learning.distillation import DistillationTask, DistillationWeights, Teacher


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
    )


def create_task(
    model: nn.Module,
    settings: Settings,
    splits: Splits,
    device: torch.device,
    teacher: tuple[Teacher, DistillationWeights] | None = None,
) -> ClassificationTask:
    """Timm's task: the cross entropy of the labels, and the terms of a teacher if there is one."""
    mixes = bool(settings.mixup or settings.cutmix)
    kwargs: dict[str, Any] = {'device': device, 'verbose': False}
    if settings.class_weights == 'balanced':
        counts = class_counts(splits)
        weight = counts.sum() / (len(counts) * counts.clamp(min=1))
        kwargs['criterion'] = nn.CrossEntropyLoss(weight, label_smoothing=0 if mixes else settings.smoothing)
    else:
        kwargs['criterion_kwargs'] = {'smoothing': settings.smoothing, 'soft_targets': mixes}
    if teacher is None:
        return ClassificationTask(model, **kwargs)
    return DistillationTask(model, teacher[0].to(device), teacher[1], **kwargs)


def sample_weights(settings: Settings, splits: Splits) -> Tensor | None:
    """Weights of the training images by which all classes are drawn equally often; None: that is not wanted."""
    if not settings.balanced_sampling:
        return None
    return (1 / class_counts(splits))[torch.tensor(_labels(splits))]


def check_labels(settings: Settings, splits: Splits) -> None:
    """Raise ValueError if labels are needed that only reading all images would tell."""
    if settings.class_weights == 'balanced' or settings.balanced_sampling:
        class_counts(splits)


def class_counts(splits: Splits) -> Tensor:
    """How many training images each class has, ``(classes,)``."""
    return torch.tensor(_labels(splits)).bincount(minlength=len(splits.label_names)).float()


def _labels(splits: Splits) -> list[int]:
    """The labels of the training images; ValueError if only reading all of them would tell."""
    files = splits.train.dataset if isinstance(splits.train, SeededSamples) else None
    labels: list[int] | None = getattr(files, 'labels', None)
    if labels is None:
        raise ValueError('expected a folder of images with --class-weights or --balanced-sampling, got other data')
    return labels

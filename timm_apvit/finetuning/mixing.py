"""Mixup and cutmix that every process repeats alike."""

from typing import Any

from timm.data import Mixup
from torch import Tensor

from timm_apvit.finetuning.data import seed_from, seeded
from timm_apvit.finetuning.schedule import Schedule


class Mixer:
    """timm's `Mixup` under the seed of an update, so that all pieces of a batch are mixed alike.

    Args:
        schedule: how to mix.
        num_classes: number of classes.
    """

    def __init__(self, schedule: Schedule, num_classes: int) -> None:
        self.seed = schedule.seed
        self.mixup: Any = None
        if schedule.mixup > 0 or schedule.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=schedule.mixup,
                cutmix_alpha=schedule.cutmix,
                prob=schedule.mixup_prob,
                label_smoothing=schedule.smoothing,
                num_classes=num_classes,
            )
        # Mixed labels are smoothed by timm.
        self.smoothing = schedule.smoothing if self.mixup is None else 0.0

    def __call__(self, images: Tensor, labels: Tensor, update: int) -> tuple[Tensor, Tensor]:
        """Mix a piece of a batch, in place: ``(B, C, H, W)``, ``(B,)`` -> the same and ``(B, classes)``.

        Without mixup and cutmix the labels stay as they are.
        """
        if self.mixup is None:
            return images, labels
        with seeded(seed_from(self.seed, update, 0, 3)):
            mixed: tuple[Tensor, Tensor] = self.mixup(images, labels)
        return mixed

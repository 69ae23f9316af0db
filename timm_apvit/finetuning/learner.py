"""A model that learns: one update from the micro-batches of a batch, and the state that resumes it."""

import math
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from torch import Tensor, nn

from timm_apvit.finetuning.samples import seed_from
from timm_apvit.finetuning.settings import Settings
from timm_apvit.finetuning.values import count
from timm_apvit.learning.parameter_groups import ADAPTIVE, BACKBONE, freeze, param_groups
from timm_apvit.models.mixin import APViT


class Learner:
    """A model, its objective, and what changes its weights.

    All that is random in an update is a function of the seed, its number and the process.

    Args:
        accelerator: says on which device, in which precision and with which other processes.
        model: trained in place.
        task: its objective, for this model.
        settings: how to train, all of them settled.
        updates_per_epoch: how often weights change in an epoch.
        mixup: of images and labels; None: neither is mixed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        task: ClassificationTask,
        settings: Settings,
        updates_per_epoch: int,
        mixup: Any = None,
    ) -> None:
        self.accelerator, self.task, self.settings, self.mixup = accelerator, task, settings, mixup
        self.device: torch.device = accelerator.device
        self.model = model
        self.adaptive = model if isinstance(model, APViT) else None
        self.budgets = settings.num_patches or ()
        self.updates_per_epoch = updates_per_epoch
        if settings.ema is not None:
            # Warming up, the average follows the weights of the first updates closely.
            task.setup_ema(settings.ema, use_warmup=True)
        if settings.grad_checkpointing:
            getattr(model, 'set_grad_checkpointing')()  # noqa: B009  of every timm model
        if settings.compile:
            for block in getattr(model, 'blocks'):  # noqa: B009  of every ViT
                # All share one compiled code, which knows nothing of budgets and hooks.
                block.compile()
        groups = param_groups(
            model,
            weight_decay=settings.weight_decay,
            layer_decay=float(settings.layer_decay or 1),
            adaptive_lr_scale=settings.localizer_lr_scale,
            backbone_lr_scale=settings.backbone_lr_scale,
        )
        optimizer = create_optimizer_v2(groups, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay)
        self.scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=settings.sched,
            num_epochs=settings.epochs,
            warmup_epochs=settings.warmup,
            warmup_lr=0.0,
            decay_rate=1.0,  # of the polynomial: a straight line
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.network: nn.Module | None = None

    def begin_epoch(self, epoch: int) -> None:
        """Set the model up for an epoch, from 0."""
        frozen = {ADAPTIVE: self.settings.freeze_localizer_epochs, BACKBONE: self.settings.freeze_backbone_epochs}
        changed = freeze(self.model, [role for role, epochs in frozen.items() if epoch < epochs])
        if self.network is None or changed:
            # What averages the gradients must know which there are, and the one before has to be gone: it listens.
            self.release()
            self.accelerator.free_memory()
            self.network = self.task.trainable_module = self.accelerator.prepare_model(self.model)
            self.accelerator.prepare_optimizer(self.optimizer)
        self.task.train()

    def update(self, micro_batches: Iterable[tuple[Tensor, Tensor]], number: int) -> dict[str, Tensor]:
        """Change the weights once.

        Args:
            micro_batches: ``grad_accum`` of this process, of equal size: ``(B, C, H, W)``, ``(B,)``.
            number: of the update, from 0.

        Returns:
            The mean of each term of the loss, on the device; on a GPU they may not be finite.
        """
        settings, accelerator = self.settings, self.accelerator
        seed = seed_from(settings.seed, number, 1) % 2**31
        self.scheduler.step_update(number)
        if self.adaptive is not None and len(self.budgets) > 1:
            self.adaptive.set_num_patches(random.Random(seed).choice(self.budgets))
        # Of dropout, stochastic depth, mixup and the like; another one in each process.
        set_seed(seed, device_specific=True)
        sums: dict[str, Tensor] = {}
        for images, labels in micro_batches:
            images, labels = (each.to(self.device, non_blocking=True) for each in (images, labels))
            images, labels = self.mixup(images, labels) if self.mixup else (images, labels)
            with accelerator.accumulate(self.network), self._jittered(number):
                with accelerator.autocast():
                    result = self.task(images, labels)
                terms = {name: value.detach() for name, value in result.items() if name != 'output'}
                if self.device.type == 'cpu':
                    # Nothing waits for it here, and to go back through patches at NaN would end the process.
                    check_finite(float(terms['loss']), f'training loss became {{}} in update {number + 1}')
                accelerator.backward(result['loss'])
                if accelerator.sync_gradients and settings.clip_grad:
                    accelerator.clip_grad_norm_(self.model.parameters(), settings.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.float() / settings.grad_accum
        self.task.update_ema(step=number + 1)
        return sums

    @contextmanager
    def _jittered(self, number: int) -> Iterator[None]:
        """Let patches jitter as they are to in an update; then, and when it is saved, as the model's arguments say."""
        settings = self.settings
        if self.adaptive is None or settings.jitter is None:
            yield
            return
        patching, own = self.adaptive.patch_embed.patching, self.adaptive.patch_embed.patching.jitter
        done = number / (settings.jitter_epochs * self.updates_per_epoch) if settings.jitter_epochs else 0.0
        try:
            patching.jitter = settings.jitter * max(0.0, 1 - done)
            yield
        finally:
            patching.jitter = own

    def tested_model(self) -> nn.Module:
        """The model to test and to export, set to its largest budget."""
        average = self._average()
        model: nn.Module = self.model if average is None else average
        if isinstance(model, APViT) and self.budgets:
            model.set_num_patches(max(self.budgets, key=count))
        return model

    def _average(self) -> nn.Module | None:
        average: nn.Module | None = self.task.get_trainable_module(ema=True).module if self.task.has_ema() else None
        return average

    @property
    def learning_rate(self) -> float:
        """The rate of the last update, before any group scales it."""
        group = self.optimizer.param_groups[0]
        return float(group['lr'] / group['lr_scale'])

    def state_dict(self) -> dict[str, Any]:
        """What resumes the training."""
        state = {'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict()}
        if (average := self._average()) is not None:
            state['ema'] = average.state_dict()
        if self.accelerator.scaler is not None:
            state['scaler'] = self.accelerator.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.model.load_state_dict(state['model'])
        self.optimizer.load_state_dict(state['optimizer'])
        if (average := self._average()) is not None:
            average.load_state_dict(state['ema'])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state['scaler'])

    def release(self) -> None:
        """Give the model back without what the accelerator wrapped about it."""
        if self.network is not None:
            self.accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)
            self.network, self.task.trainable_module = None, self.model


def check_finite(loss: float, what: str) -> None:
    """Raise FloatingPointError, with what became of it, unless a loss is finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(f'the {what.format(loss)}; try a lower --lr')

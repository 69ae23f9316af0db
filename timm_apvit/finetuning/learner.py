"""A model that learns: one update from the pieces of a batch, with all that an update needs."""

import gc
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from timm_apvit.finetuning.data import seed_from
from timm_apvit.finetuning.distillation import Teacher, Weights, distilled_loss, observed
from timm_apvit.finetuning.distributed import distribute, sum_over_processes, world_size
from timm_apvit.finetuning.evaluation import autocast
from timm_apvit.finetuning.mixing import Mixer
from timm_apvit.finetuning.optimization import (
    create_optimizer,
    create_scheduler,
    freeze,
    learning_rate,
)
from timm_apvit.finetuning.parsing import count
from timm_apvit.finetuning.schedule import Schedule
from timm_apvit.models.mixin import APViT

CLIP_GRAD_NORM = 1.0


class Distillation(NamedTuple):
    """A teacher and what of it counts how much."""

    teacher: Teacher
    weights: Weights


def mean_losses(losses: Sequence[Tensor], first: int) -> list[float]:
    """The losses of some updates, averaged over the processes.

    Args:
        losses: of this process, scalars.
        first: the number of the first of these updates, from 0.

    Raises:
        FloatingPointError: one is not finite.
    """
    values: list[float] = (sum_over_processes(torch.stack(list(losses))) / world_size()).tolist()
    for update, value in enumerate(values, start=first + 1):
        if not math.isfinite(value):
            raise FloatingPointError(f'the training loss became {value} in update {update}; try a lower --lr')
    return values


class Learner:
    """A model and the state of its training.

    Args:
        model: trained in place.
        schedule: how to train.
        num_classes: of the labels.
        updates_per_epoch: how often weights change in an epoch.
        distillation: what to learn from besides the labels.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        num_classes: int,
        updates_per_epoch: int,
        distillation: Distillation | None = None,
    ) -> None:
        self.schedule = schedule
        self.updates_per_epoch = updates_per_epoch
        self.device = torch.device(schedule.device)
        self.model = model.to(self.device)
        self.distillation = distillation
        self.budgets = schedule.num_patches or ()
        self.optimizer = create_optimizer(model, schedule)
        self.scheduler = create_scheduler(self.optimizer, schedule, updates_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=schedule.amp == 'float16')
        self.mixer = Mixer(schedule, num_classes)
        # Warming up, the average follows the weights of the first updates closely.
        self.ema = None if schedule.ema is None else ModelEmaV3(model, decay=schedule.ema, use_warmup=True)
        if distillation is not None:
            distillation.teacher.to(self.device)
        if schedule.grad_checkpointing:
            getattr(model, 'set_grad_checkpointing')()  # noqa: B009  of every timm model
        if schedule.compile:
            for block in getattr(model, 'blocks'):  # noqa: B009  of every ViT
                # All share one compiled code, which knows nothing of budgets and hooks.
                block.compile()
        self.network: nn.Module | None = None

    def tested_model(self) -> nn.Module:
        """The model to test and to export, set to its largest budget."""
        model: nn.Module = self.model if self.ema is None else self.ema.module
        if isinstance(model, APViT) and self.budgets:
            model.set_num_patches(max(self.budgets, key=count))
        return model

    @contextmanager
    def exposed(self, model: nn.Module, update: int) -> Iterator[None]:
        """Let a model's patches move as they are to in an update; then, and when it is saved, as its arguments say."""
        if not isinstance(model, APViT) or self.schedule.jitter is None:
            yield
            return
        patching, own = model.patch_embed.patching, model.patch_embed.patching.jitter
        epochs = self.schedule.jitter_epochs
        done = update / (epochs * self.updates_per_epoch) if epochs else 0.0
        try:
            patching.jitter = self.schedule.jitter * max(0.0, 1 - done)
            yield
        finally:
            patching.jitter = own

    @property
    def learning_rate(self) -> float:
        """The rate of the last update."""
        return learning_rate(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """What resumes the training."""
        state = {'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict()}
        if self.ema is not None:
            state['ema'] = self.ema.module.state_dict()
        if self.scaler.is_enabled():
            state['scaler'] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.model.load_state_dict(state['model'])
        self.optimizer.load_state_dict(state['optimizer'])
        if self.ema is not None:
            self.ema.module.load_state_dict(state['ema'])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state['scaler'])

    def begin_epoch(self, epoch: int) -> None:
        """Set the model up for an epoch, from 0."""
        self.model.train()
        changed = freeze(self.model, self.schedule, epoch)
        if self.network is None or changed:
            # What averages the gradients must know which there are. The one before has to be gone: it listens to them.
            self.network = None
            gc.collect()
            self.network = distribute(self.model, self.device)

    def update(self, pieces: Iterable[tuple[Tensor, Tensor]], update: int) -> Tensor:
        """Change the weights once.

        Args:
            pieces: this process' ``grad_accum`` pieces of the batch, of equal size: ``(B, C, H, W)``, ``(B,)``.
            update: its number, from 0.

        Returns:
            The mean loss of the pieces, on the device; on a GPU it may not be finite.

        Raises:
            FloatingPointError: it is not finite, on a CPU.
        """
        self.scheduler.step_update(update)
        if len(self.budgets) > 1 and isinstance(self.model, APViT):
            chooser = random.Random(seed_from(self.schedule.seed, update, 0, 4))
            self.model.set_num_patches(chooser.choice(self.budgets))
        self.model.zero_grad()  # also of what the optimiser leaves alone
        self.optimizer.zero_grad()
        number = self.schedule.grad_accum
        total = torch.zeros((), device=self.device)
        for n, (images, labels) in enumerate(pieces, start=1):
            with self._synchronising(n == number), self.exposed(self.model, update):
                loss = self._loss(images, labels, update) / number
                if self.device.type == 'cpu':
                    # Nothing waits for it here, and to go back through patches at NaN would end the process.
                    mean_losses([loss.detach()], update)
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, step=update + 1)
        return total

    def _loss(self, images: Tensor, labels: Tensor, update: int) -> Tensor:
        images, labels = (each.to(self.device, non_blocking=True) for each in (images, labels))
        images, labels = self.mixer(images, labels, update)
        distillation = self.distillation
        with autocast(self.device, self.schedule.amp):
            if distillation is None:
                return self._label_loss((self.network or self.model)(images), labels)
            wants_attention = distillation.weights.attention > 0 and isinstance(self.model, APViT)
            lesson = distillation.teacher(images, wants_attention)
            answer = observed(self.model, images, self.network)
            loss = self._label_loss(answer.logits, labels)
            return distilled_loss(loss, answer, lesson, distillation.weights)

    def _label_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.mixer.smoothing)

    def _synchronising(self, last: bool) -> AbstractContextManager[Any]:
        """Average the gradients over the processes with the last piece only."""
        if last or not isinstance(self.network, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.network.no_sync()

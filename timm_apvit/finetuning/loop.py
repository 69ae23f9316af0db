"""The training loop: a model, its data and settings -> checkpoints and metrics.

A training that was interrupted continues, from its last checkpoint, to the very result of an unbroken one.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn

from timm_apvit.finetuning.checkpoints import LAST, CheckpointStore
from timm_apvit.finetuning.evaluation import evaluate_budgets
from timm_apvit.finetuning.learner import Learner, check_finite
from timm_apvit.finetuning.objectives import create_mixup, create_task, sample_weights
from timm_apvit.finetuning.progress import Progress
from timm_apvit.finetuning.report import Row, best_row
from timm_apvit.finetuning.samples import BatchSplit, Splits, seed_from
from timm_apvit.finetuning.settings import Settings
from timm_apvit.finetuning.signals import Interrupted, StopSignals
from timm_apvit.learning.adaptation import adaptation
from timm_apvit.learning.distillation import DistillationWeights, Teacher
from timm_apvit.learning.glance import collapsed, fit_glance, glance_of
from timm_apvit.models.glance import glances
from timm_apvit.models.mixin import APViT

# What a saved state holds.
STATE_KEYS = {'model', 'optimizer', 'rows', 'label_names', 'images', 'update', 'partial'}
# Reading a loss makes the CPU wait for the GPU, and for other processes: so losses are read together, after so many
# updates. That is also how often it is seen that a checkpoint is due, or the end.
READ_EVERY = 20
# Test images in which it is measured whether patches move.
MEASURED = 64

Export = Callable[[nn.Module, Path], None]
Report = Callable[[list[Row]], None]

_logger = logging.getLogger(__name__)


class Training:
    """A training of a model from the last checkpoint of a store, or from the beginning if there is none.

    All processes make and run one alike; the main one saves and reports.

    Args:
        accelerator: says on which device, in which precision and with which other processes.
        model: trained in place.
        splits: training and test data.
        settings: how to train, all of them settled.
        store: of checkpoints.
        teacher: to learn from besides the labels, and the weights of its terms.
        name: for people.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        splits: Splits,
        settings: Settings,
        store: CheckpointStore,
        teacher: tuple[Teacher, DistillationWeights] | None = None,
        name: str = '',
    ) -> None:
        self.accelerator, self.splits, self.settings, self.store, self.name = accelerator, splits, settings, store, name
        self.split = BatchSplit(accelerator.process_index, accelerator.num_processes, settings.grad_accum)
        # A last, smaller batch is left out unless it is the only one.
        self.updates_per_epoch = max(1, len(splits.train) // settings.images_of_update)
        self.weights = sample_weights(settings, splits)
        self.warned = False
        state = store.load() or {'rows': [], 'update': 0, 'partial': {'sums': {}, 'seconds': 0.0}}
        if len(set(gather_object([state['update']]))) > 1:
            raise RuntimeError('expected every process to find the same checkpoint, got different ones: is the folder '
                               'of the run on a file system that all machines share?')  # fmt: skip
        self.rows: list[Row] = state['rows']
        self.step: int = state['update']
        self.sums = defaultdict(float, state['partial']['sums'])
        self.seconds: float = state['partial']['seconds']
        self.model, self.teacher = model.to(accelerator.device), teacher
        self.state = state if self.step else None

    def run(self, export: Export, report: Report) -> list[Row]:
        """Train to the end, saving a checkpoint after each epoch.

        Args:
            export: writes a model into a directory for those who want to use it.
            report: called with the rows so far after each epoch has been saved.

        Returns:
            For each epoch: ``epoch`` from 1, last ``lr``, mean ``train_loss`` (and its terms, if there are several),
            ``test_loss``, ``test_top1`` in [0, 1] (and these two for each of several budgets), the figures of
            `adaptation`, ``seconds``.
        """
        settings, is_main = self.settings, self.accelerator.is_main_process
        epochs, images = int(settings.epochs or 0), min(settings.images_of_update, len(self.splits.train))
        progress = Progress(self.name, self.updates_per_epoch, images, epochs, self.step, settings.log_every, is_main)
        if self.rows and is_main:
            self.store.mark_best(self._best())
            report(self.rows)
        with StopSignals() as stop, progress.bar:
            self._begin()
            try:
                while len(self.rows) < epochs and not self._is_stale():
                    self._train_epoch(len(self.rows), progress, stop, export)
                    self.rows.append(self._tested())
                    self.sums, self.seconds = defaultdict(float), 0.0
                    self._save(export)
                    if is_main:
                        report(self.rows)
                    self._end_if_asked(stop)
            finally:
                self.learner.release()
        return self.rows

    def _begin(self) -> None:
        """Make what learns, from the checkpoint or anew."""
        accelerator, settings, splits, model = self.accelerator, self.settings, self.splits, self.model
        if self.state is None and isinstance(model, APViT) and needs_glance_fit(model, settings):
            self._fit_glance(model)
        task = create_task(model, settings, splits, accelerator.device, self.teacher)
        mixup = create_mixup(settings, len(splits.label_names))
        self.learner = Learner(accelerator, model, task, settings, self.updates_per_epoch, mixup)
        if self.state is not None:
            self.learner.load_state_dict(self.state)
            self.state = None  # which is as large as the model and its optimiser

    def _train_epoch(self, epoch: int, progress: Progress, stop: StopSignals, export: Export) -> None:
        """Train for the updates that an epoch, from 0, has left."""
        self.learner.begin_epoch(epoch)
        begun, earlier, saved = time.monotonic(), self.seconds, time.monotonic()
        always = self.accelerator.device.type == 'cpu' and self.accelerator.num_processes == 1
        unread: list[dict[str, Tensor]] = []
        done, settings = self.step - epoch * self.updates_per_epoch, self.settings
        batches = self.splits.train.training_batches(
            epoch, settings.images_of_update, self.split, done, self.weights, settings.workers or 0,
            pin_memory=self.accelerator.device.type == 'cuda',
        )  # fmt: skip
        for number in range(done + 1, self.updates_per_epoch + 1):
            unread.append(self.learner.update(islice(batches, settings.grad_accum), self.step))
            self.step += 1
            mean = None
            if always or len(unread) == READ_EVERY or number == self.updates_per_epoch:
                late = time.monotonic() - saved > 60 * (settings.save_minutes or math.inf)
                due = self._read(unread, late or stop.number != 0)
                unread, mean = [], self.sums['loss'] / number
                if due and number < self.updates_per_epoch:
                    self.seconds = earlier + time.monotonic() - begun
                    self._save(export)
                    self._end_if_asked(stop)
                    saved = time.monotonic()
            progress.advance(mean)
        self.seconds = earlier + time.monotonic() - begun

    def _read(self, unread: list[dict[str, Tensor]], due: bool) -> bool:
        """Add the losses of the last updates, averaged over processes; say whether a checkpoint is due in any."""
        names = sorted(unread[0])
        values = torch.stack([torch.stack([each[name] for name in names]) for each in unread])
        values = self.accelerator.reduce(values, reduction='mean')
        for number, row in enumerate(values.tolist(), start=self.step - len(unread)):
            for name, value in zip(names, row, strict=True):
                check_finite(value, f'training loss became {{}} in update {number + 1}')
                self.sums[name] += value
        return bool(self.accelerator.reduce(torch.tensor(float(due), device=values.device)) > 0)

    def _tested(self) -> Row:
        """The row of the epoch that was just trained."""
        settings, begun, model = self.settings, time.monotonic(), self.learner.tested_model()
        batch_size = max(1, settings.images_of_update // self.split.parts)
        metrics = evaluate_budgets(
            model, self.splits, self.learner.budgets, batch_size, settings.workers or 0, settings.amp, self.split
        )
        epoch = len(self.rows) + 1
        check_finite(metrics['test_loss'], f'test loss became {{}} after epoch {epoch}')
        if isinstance(model, APViT):
            images = self.splits.test.some(MEASURED)[0].to(self.accelerator.device)
            metrics |= {name: round(value, 4) for name, value in adaptation(model, images).items()}
            warning = collapsed(model, images) if glances(model) and not self.warned else None
            if warning and self.accelerator.is_main_process:
                self.warned = True
                _logger.warning(warning)
        means = {
            f'train_{name}': value / self.updates_per_epoch for name, value in sorted(self.sums.items(), reverse=True)
        }
        row = {'epoch': epoch, 'lr': self.learner.learning_rate, 'train_loss': means.pop('train_loss'), **means}
        return {**row, **metrics, 'seconds': round(self.seconds + time.monotonic() - begun, 2)}

    def _save(self, export: Export) -> None:
        """Save a checkpoint, in the main process."""
        if not self.accelerator.is_main_process:
            return
        state = {
            **self.learner.state_dict(),
            'rows': self.rows,
            'label_names': list(self.splits.label_names),
            'images': len(self.splits.train),
            'update': self.step,
            'partial': {'sums': dict(self.sums), 'seconds': self.seconds},
        }
        within = self.step - len(self.rows) * self.updates_per_epoch
        name = _version(len(self.rows)) + f'-update-{within:07d}' * (within > 0)
        self.store.save(name, state, self._best(), lambda directory: export(self.learner.tested_model(), directory))

    def _best(self) -> str | None:
        return _version(int(best_row(self.rows, self.settings.monitor)['epoch'])) if self.rows else None

    def _is_stale(self) -> bool:
        """Whether the last epochs brought nothing better, and no more are wanted then."""
        patience, epochs = self.settings.patience, len(self.rows)
        return bool(patience and epochs and epochs - best_row(self.rows, self.settings.monitor)['epoch'] >= patience)

    def _end_if_asked(self, stop: StopSignals) -> None:
        if number := max(gather_object([stop.number])):
            raise Interrupted(number)

    def _fit_glance(self, model: APViT) -> None:
        """Give the glance its head start, in all processes alike."""
        settings = self.settings
        set_seed(seed_from(settings.seed, 0, 2) % 2**31)
        parts = self.split._replace(rank=0, world=1)
        batches = self.splits.train.training_batches(0, settings.images_of_update, parts, workers=settings.workers or 0)
        number = self.updates_per_epoch * settings.grad_accum
        loss = nn.functional.binary_cross_entropy_with_logits if settings.multi_label else nn.functional.cross_entropy
        with self.accelerator.autocast():
            fit_glance(model, islice(batches, number), int(settings.glance_epochs or 0), loss=loss)
        if self.split.world > 1:  # of a stream each process has seen shards of its own
            for value in glance_of(model).state_dict().values():
                torch.distributed.broadcast(value, 0)


def needs_glance_fit(model: APViT, settings: Settings) -> bool:
    """Whether the glance of a model that has one is fitted first: it is to learn, and is new to the classes."""
    wanted = bool(settings.glance_epochs) and settings.freeze_localizer_epochs == 0
    return wanted and glances(model) and not glance_of(model).knows_classes


def load_state(store: CheckpointStore) -> dict[str, Any] | None:
    """The state to continue from, if there is one; ValueError if it is not readable, or none of ours."""
    state = store.load()
    if state is not None and not (isinstance(state, dict) and state.keys() >= STATE_KEYS):
        expected = f'a saved state with {", ".join(sorted(STATE_KEYS))}'
        raise ValueError(f'expected {expected} in {store.directory / LAST}, got another')
    return state


def check_state(state: dict[str, Any], splits: Splits, settings: Settings) -> None:
    """Raise ValueError unless training can continue from a state."""
    if tuple(state['label_names']) != splits.label_names:
        own, given = ', '.join(state['label_names']), ', '.join(splits.label_names)
        raise ValueError(f'expected the classes that the run was trained on, {own}, got {given}')
    if state['images'] != len(splits.train):
        raise ValueError(
            f'expected the {state["images"]} training images that the run began with, got {len(splits.train)}: begin '
            'another one from its best model'
        )
    if len(state['rows']) > (settings.epochs or 0):
        raise ValueError(f'expected --epochs of at least the {len(state["rows"])} that are done, got {settings.epochs}')


def _version(epoch: int) -> str:
    return f'epoch-{epoch:04d}'

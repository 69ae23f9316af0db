"""The training loop: a model, its data and settings -> checkpoints and metrics.

A training that was interrupted continues, from its last checkpoint, to the very result of an unbroken one.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn

from timm_apvit.finetuning.batches import Division, Splits, batches_to_train, some_samples, updates_per_epoch
from timm_apvit.finetuning.evaluation import evaluate_budgets
from timm_apvit.finetuning.folder import CheckpointStore
from timm_apvit.finetuning.learner import Learner, check_finite
from timm_apvit.finetuning.objectives import create_mixup, create_task, sample_weights
from timm_apvit.finetuning.progress import Progress
from timm_apvit.finetuning.samples import seed_from
from timm_apvit.finetuning.settings import Settings
from timm_apvit.finetuning.signals import Interrupted, StopSignals
from timm_apvit.finetuning.streams import Stream
from timm_apvit.learning.adaptation import adaptation
from timm_apvit.learning.distillation import DistillationWeights, Teacher
from timm_apvit.learning.glance import collapsed, fit_glance, glance_of
from timm_apvit.models.glance import glances
from timm_apvit.models.mixin import APViT

# What a saved state holds.
STATE_KEYS = {'model', 'optimizer', 'rows', 'label_names', 'images', 'update', 'partial'}
# Looking at a loss makes the CPU wait for the GPU, and for other processes: so losses are looked at together, after so
# many updates.
LOOK_EVERY = 20
# Test images in which it is looked whether patches move.
LOOKED_AT = 64

Row = dict[str, float]
Export = Callable[[nn.Module, Path], None]

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

    Raises:
        ValueError: a checkpoint that is not readable, or data that do not say their labels where these are needed.
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
        self.division = Division(accelerator.process_index, accelerator.num_processes, settings.grad_accum)
        self.updates = updates_per_epoch(splits.train, settings.batch_size)  # of an epoch
        self.weights = sample_weights(settings, splits)
        self.told_collapse = False
        state = store.load() or {'rows': [], 'update': 0, 'partial': {'sums': {}, 'seconds': 0.0}}
        if len(set(gather_object([state['update']]))) > 1:
            raise RuntimeError('expected every process to find the same checkpoint, got different ones: is the folder '
                               'of the run on a file system that all machines share?')  # fmt: skip
        self.rows: list[Row] = state['rows']
        self.update: int = state['update']
        self.sums = defaultdict(float, state['partial']['sums'])
        self.seconds: float = state['partial']['seconds']
        model = model.to(accelerator.device)
        if not self.update and isinstance(model, APViT) and fits_first(model, settings):
            self._fit_glance(model)
        task = create_task(model, settings, splits, accelerator.device, teacher)
        mixup = create_mixup(settings, len(splits.label_names))
        self.learner = Learner(accelerator, model, task, settings, self.updates, mixup)
        if self.update:
            self.learner.load_state_dict(state)

    def run(self, export: Export, tell: Callable[[list[Row]], None]) -> list[Row]:
        """Train to the end, saving a checkpoint after each epoch.

        Args:
            export: writes a model into a directory for those who want to use it.
            tell: called with the rows so far after each epoch has been saved.

        Returns:
            For each epoch: ``epoch`` from 1, last ``lr``, mean ``train_loss`` (and its terms, if there are several),
            ``test_loss``, ``test_top1`` in [0, 1] (and these two for each of several budgets), the figures of
            `adaptation`, ``seconds``.

        Raises:
            FloatingPointError: the loss is not finite.
            Interrupted: a signal asked for the end; a checkpoint has been saved.
        """
        settings, is_main = self.settings, self.accelerator.is_main_process
        epochs, images = int(settings.epochs or 0), min(settings.batch_size, len(self.splits.train))
        progress = Progress(self.name, self.updates, images, epochs, self.update, settings.log_every, is_main)
        if self.rows and is_main:
            self.store.mark_best(self._best())
            tell(self.rows)
        try:
            with StopSignals() as stop:
                while len(self.rows) < epochs and not self._is_stale():
                    self._train_epoch(len(self.rows), progress, stop, export)
                    self.rows.append(self._tested())
                    self.sums, self.seconds = defaultdict(float), 0.0
                    self._save(export)
                    if is_main:
                        tell(self.rows)
                    self._end_if(stop)
        finally:
            self.learner.release()
        return self.rows

    def _train_epoch(self, epoch: int, progress: Progress, stop: StopSignals, export: Export) -> None:
        """Train for the updates that an epoch, from 0, has left."""
        self.learner.begin_epoch(epoch)
        begun, earlier, saved = time.monotonic(), self.seconds, time.monotonic()
        often = self.accelerator.device.type == 'cpu' and self.accelerator.num_processes == 1
        unseen: list[dict[str, Tensor]] = []
        done = self.update - epoch * self.updates
        loading = self._loading(epoch, done)
        with progress.epoch(epoch):
            for number in range(done + 1, self.updates + 1):
                micro_batches = islice(loading, self.settings.grad_accum)
                unseen.append(self.learner.update(micro_batches, self.update))
                self.update += 1
                mean = None
                if often or len(unseen) == LOOK_EVERY or number == self.updates:
                    late = time.monotonic() - saved > 60 * (self.settings.save_minutes or math.inf)
                    due = self._look(unseen, late or stop.number != 0)
                    unseen, mean = [], self.sums['loss'] / number
                    if due and number < self.updates:
                        self.seconds = earlier + time.monotonic() - begun
                        self._save(export)
                        self._end_if(stop)
                        saved = time.monotonic()
                progress.advance(mean)
        self.seconds = earlier + time.monotonic() - begun

    def _loading(self, epoch: int, done: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches of this process of what an epoch has left after so many updates."""
        settings, on_gpu = self.settings, self.accelerator.device.type == 'cuda'
        batches: Any = batches_to_train(self.splits.train, epoch, settings.batch_size, self.division, done,
                                        self.weights, settings.workers or 0, on_gpu)  # fmt: skip
        # A stream cannot be entered in its middle: what was done is read again.
        again = done * settings.grad_accum if isinstance(self.splits.train, Stream) else 0
        return islice(iter(batches), again, None)

    def _look(self, unseen: list[dict[str, Tensor]], due: bool) -> bool:
        """Add the losses of the last updates, averaged over processes; tell whether a checkpoint is due in any."""
        names = sorted(unseen[0])
        values = torch.stack([torch.stack([each[name] for name in names]) for each in unseen])
        values = self.accelerator.reduce(values, reduction='mean')
        for number, row in enumerate(values.tolist(), start=self.update - len(unseen)):
            for name, value in zip(names, row, strict=True):
                check_finite(value, number)
                self.sums[name] += value
        return bool(self.accelerator.reduce(torch.tensor(float(due), device=values.device)) > 0)

    def _tested(self) -> Row:
        """The row of the epoch that was just trained."""
        settings, begun, model = self.settings, time.monotonic(), self.learner.tested_model()
        batch_size = max(1, settings.batch_size // self.division.parts)
        metrics = evaluate_budgets(
            model, self.splits, self.learner.budgets, batch_size, settings.workers or 0, settings.amp, self.division
        )
        epoch = len(self.rows) + 1
        if not math.isfinite(metrics['test_loss']):
            raise FloatingPointError(
                f'the test loss became {metrics["test_loss"]} after epoch {epoch}; try a lower --lr'
            )
        if isinstance(model, APViT):
            shown = torch.stack([image for image, _ in some_samples(self.splits.test, LOOKED_AT)])
            shown = shown.to(self.accelerator.device)
            metrics |= {name: round(value, 4) for name, value in adaptation(model, shown).items()}
            sentence = collapsed(model, shown) if glances(model) and not self.told_collapse else None
            if sentence and self.accelerator.is_main_process:
                self.told_collapse = True
                _logger.warning(sentence)
        means = {f'train_{name}': value / self.updates for name, value in sorted(self.sums.items(), reverse=True)}
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
            'update': self.update,
            'partial': {'sums': dict(self.sums), 'seconds': self.seconds},
        }
        within = self.update - len(self.rows) * self.updates
        name = _version(len(self.rows)) + f'-update-{within:07d}' * (within > 0)
        self.store.save(name, state, self._best(), lambda directory: export(self.learner.tested_model(), directory))

    def _best(self) -> str | None:
        return _version(int(best_row(self.rows, self.settings.monitor)['epoch'])) if self.rows else None

    def _is_stale(self) -> bool:
        """Whether the last epochs brought nothing better, and no more are wanted then."""
        patience = self.settings.patience
        return (
            patience is not None
            and len(self.rows) > 0
            and len(self.rows) - best_row(self.rows, self.settings.monitor)['epoch'] >= patience
        )

    def _end_if(self, stop: StopSignals) -> None:
        if number := max(gather_object([stop.number])):
            raise Interrupted(number)

    def _fit_glance(self, model: APViT) -> None:
        """Give the glance its head start, in all processes alike."""
        settings = self.settings
        set_seed(seed_from(settings.seed, 0, 2) % 2**31)
        batches: Any = batches_to_train(self.splits.train, 0, settings.batch_size, workers=settings.workers or 0)
        with self.accelerator.autocast():
            fit_glance(model, islice(batches, self.updates), int(settings.glance_epochs or 0))


def fits_first(model: APViT, settings: Settings) -> bool:
    """Whether the glance of a model that has one is fitted first: it is to learn, and is new to the classes."""
    wanted = bool(settings.glance_epochs) and settings.freeze_localizer_epochs == 0
    return wanted and glances(model) and not glance_of(model).knows_classes


def check_state(store: CheckpointStore, splits: Splits) -> bool:
    """Whether there is a checkpoint to continue from; ValueError if it is of other data, or none of ours."""
    state = store.load()
    if state is None:
        return False
    if not (isinstance(state, dict) and state.keys() >= STATE_KEYS):
        raise ValueError(f'expected a saved state with {", ".join(sorted(STATE_KEYS))}, got another file')
    if tuple(state['label_names']) != splits.label_names:
        own, given = ', '.join(state['label_names']), ', '.join(splits.label_names)
        raise ValueError(f'expected the classes that the run was trained on, {own}, got {given}')
    if state['images'] != len(splits.train):
        raise ValueError(
            f'expected the {state["images"]} training images that the run began with, got {len(splits.train)}: begin '
            'another one from its best model'
        )
    return True


def best_row(rows: list[Row], monitor: str = 'test_top1') -> Row:
    """The row of the best epoch: the first one of the highest test accuracy, or of the lowest loss."""
    return max(rows, key=lambda row: row[monitor] * (-1 if 'loss' in monitor else 1))


def _version(epoch: int) -> str:
    return f'epoch-{epoch:04d}'

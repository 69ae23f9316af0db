"""The training loop: a model, its data and a schedule -> checkpoints and metrics.

An epoch starts from seeds of its own, so that a training that was interrupted in one continues, from the checkpoint
before, to the very result of an unbroken one.
"""

import logging
import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_apvit.finetuning.checkpoints import CheckpointStore
from timm_apvit.finetuning.data import Splits, create_batches, seed_from, some_samples
from timm_apvit.finetuning.distributed import gather_from_processes, is_main, own_share, rank
from timm_apvit.finetuning.evaluation import autocast, evaluate_budgets
from timm_apvit.finetuning.learner import Distillation, Learner, mean_losses
from timm_apvit.finetuning.progress import Progress
from timm_apvit.finetuning.schedule import Schedule
from timm_apvit.learning.glance import collapsed, fit_glance, glance_of
from timm_apvit.models.glance import glances
from timm_apvit.models.mixin import APViT

# What a saved state holds.
STATE_KEYS = {'model', 'optimizer', 'rows', 'label_names'}
# Looking at a loss makes the CPU wait for the GPU: so losses are looked at together, after so many updates.
CHECK_EVERY = 20

Row = dict[str, float]

_logger = logging.getLogger(__name__)


def train(
    model: nn.Module,
    splits: Splits,
    schedule: Schedule,
    store: CheckpointStore,
    export: Callable[[nn.Module, Path], None],
    on_epoch: Callable[[list[Row]], None],
    name: str,
    distillation: Distillation | None = None,
) -> list[Row]:
    """Train a model, saving a checkpoint after each epoch; continue where the store's last checkpoint left off.

    All processes call it alike; the main one saves and reports.

    Args:
        model: trained in place.
        splits: training and test data.
        schedule: how to train.
        store: of checkpoints.
        export: writes a model into a directory for those who want to use it.
        on_epoch: called with the rows so far after each epoch has been saved.
        name: for the progress bar.
        distillation: what to learn from besides the labels.

    Returns:
        For each epoch: ``epoch`` from 1, last ``lr``, mean ``train_loss``, ``test_loss``, ``test_top1`` in [0, 1] (and
        these two for each of several budgets), ``seconds``.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    share = own_share(schedule.grad_accum)
    updates_per_epoch = len(_batches(splits, schedule, epoch=0)) // share.pieces
    learner = Learner(model, schedule, len(splits.label_names), updates_per_epoch, distillation)
    rows = _restore(learner, store, on_epoch)
    epochs = range(len(rows), schedule.epochs)
    glancing = model if isinstance(model, APViT) and glances(model) else None
    if glancing and not rows and fits_first(glancing, schedule):
        torch.manual_seed(seed_from(schedule.seed, 0, 2))  # all processes do the same
        batches = create_batches(splits.train, 0, schedule.batch_size, shuffle=True, workers=schedule.workers)
        with autocast(learner.device, schedule.amp):
            fit_glance(glancing, batches, schedule.glance_epochs)
    images = min(schedule.batch_size, len(splits.train))
    progress = Progress(name, updates_per_epoch, images, epochs, shown=is_main())
    for epoch in epochs:
        start = time.monotonic()
        # Dropout, stochastic depth and the like: other numbers than those that order the data, in every process.
        torch.manual_seed(seed_from(schedule.seed, epoch, 1, rank()))
        train_loss = _train_epoch(learner, _batches(splits, schedule, epoch), epoch, progress)
        metrics = evaluate_budgets(
            learner.tested_model(),
            splits,
            learner.budgets,
            max(1, schedule.batch_size // share.parts),
            schedule.workers,
            schedule.amp,
        )
        if glancing and is_main():
            shown = torch.stack([image for image, _ in some_samples(splits.test, 16)])
            if sentence := collapsed(glancing, shown.to(learner.device)):
                _logger.warning(sentence)
                glancing = None  # told once
        if not math.isfinite(metrics['test_loss']):
            raise FloatingPointError(
                f'the test loss became {metrics["test_loss"]} after epoch {epoch + 1}; try a lower --lr'
            )
        row = {'epoch': epoch + 1, 'lr': learner.learning_rate, 'train_loss': train_loss, **metrics}
        rows.append({**row, 'seconds': round(time.monotonic() - start, 2)})
        if is_main():
            state = {**learner.state_dict(), 'rows': rows, 'label_names': list(splits.label_names)}
            store.save(
                _version(epoch + 1),
                state,
                _version(_best(rows)),
                lambda directory: export(learner.tested_model(), directory),
            )
            on_epoch(rows)
    return rows


def fits_first(model: APViT, schedule: Schedule) -> bool:
    """Whether the glance of a model that has one is fitted first: it is to learn, and is new to the classes."""
    free = schedule.freeze_localizer_epochs == 0
    return schedule.glance_epochs > 0 and free and not glance_of(model).knows_classes


def best_row(rows: list[Row]) -> Row:
    """The row of the best epoch: the first one of the highest test accuracy."""
    return max(rows, key=lambda row: row['test_top1'])


def _best(rows: list[Row]) -> int:
    return int(best_row(rows)['epoch'])


def _version(epoch: int) -> str:
    return f'epoch-{epoch:04d}'


def _restore(learner: Learner, store: CheckpointStore, on_epoch: Callable[[list[Row]], None]) -> list[Row]:
    """Continue from the last checkpoint, if there is one, and return the rows so far."""
    state = store.load()
    rows: list[Row] = [] if state is None else state['rows']
    epochs = [len(others) for others in gather_from_processes(rows)]
    if len(set(epochs)) > 1:
        raise RuntimeError(f'expected every process to find the same checkpoint, got epochs {epochs}: is the folder '
                           'of the run on a file system that all machines share?')  # fmt: skip
    if state is not None:
        learner.load_state_dict(state)
        if is_main():
            store.mark_best(_version(_best(rows)))
            on_epoch(rows)
    return rows


def _batches(splits: Splits, schedule: Schedule, epoch: int) -> DataLoader[tuple[Tensor, int]]:
    return create_batches(
        splits.train,
        epoch,
        schedule.batch_size,
        shuffle=True,
        workers=schedule.workers,
        pin_memory=torch.device(schedule.device).type == 'cuda',
        share=own_share(schedule.grad_accum),
    )


def _train_epoch(learner: Learner, pieces: DataLoader[tuple[Tensor, int]], epoch: int, progress: Progress) -> float:
    """Train for one epoch, from 0, and return the mean loss."""
    learner.begin_epoch(epoch)
    first = epoch * learner.updates_per_epoch
    losses: list[float] = []
    unseen: list[Tensor] = []
    updates = range(first, first + learner.updates_per_epoch)
    loading = iter(pieces)
    with progress.epoch(epoch):
        for update in updates:
            unseen.append(learner.update(islice(loading, learner.schedule.grad_accum), update))
            mean = None
            if len(unseen) == CHECK_EVERY or update == updates[-1]:
                losses += mean_losses(unseen, update + 1 - len(unseen))
                mean, unseen = sum(losses) / len(losses), []
            progress.advance(mean)
    return sum(losses) / len(losses)

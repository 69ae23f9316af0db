"""The training loop: a model, its data and a schedule -> checkpoints and metrics.

An epoch starts from seeds of its own, so that a training that was interrupted in one continues, from the checkpoint
before, to the very result of an unbroken one.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_apvit.finetuning.checkpoints import CheckpointStore
from timm_apvit.finetuning.data import Splits, create_batches, seed_from

CLIP_GRAD_NORM = 1.0
# What a saved state holds.
STATE_KEYS = {'model', 'optimizer', 'rows', 'label_names'}

Row = dict[str, float]


class Schedule(NamedTuple):
    """How to train.

    Attributes:
        epochs: number of epochs.
        batch_size: of training and test.
        lr: learning rate at its peak.
        weight_decay: of AdamW.
        layer_decay: factor of the learning rate from one block to the one below it; 1: the same rate everywhere.
        warmup: epochs over which the learning rate rises, of ``epochs``; a cosine follows.
        seed: of the order and augmentation of the data and of what is random in the model.
        workers: processes that load data; 0: none but this one.
        device: where to train.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    layer_decay: float
    warmup: float
    seed: int
    workers: int
    device: str


def train(
    model: nn.Module,
    splits: Splits,
    schedule: Schedule,
    store: CheckpointStore,
    export: Callable[[Path], None],
    on_epoch: Callable[[list[Row]], None],
    name: str,
) -> list[Row]:
    """Train a model, saving a checkpoint after each epoch; continue where the store's last checkpoint left off.

    Args:
        model: trained in place.
        splits: training and test data.
        schedule: how to train.
        store: of checkpoints.
        export: writes the model, as it is, into a directory for those who want to use it.
        on_epoch: called with the rows so far after each epoch has been saved.
        name: for the progress bar.

    Returns:
        For each epoch: ``epoch`` from 1, last ``lr``, mean ``train_loss``, ``test_loss``, ``test_top1`` in [0, 1],
        ``seconds``.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    device = torch.device(schedule.device)
    model.to(device)
    optimizer = create_optimizer_v2(
        model,
        opt='adamw',
        lr=schedule.lr,
        weight_decay=schedule.weight_decay,
        layer_decay=schedule.layer_decay if schedule.layer_decay != 1 else None,
    )
    updates_per_epoch = len(create_batches(splits.train, 0, schedule.batch_size, shuffle=True))
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched='cosine',
        num_epochs=schedule.epochs,
        warmup_epochs=schedule.warmup,
        warmup_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    rows: list[Row] = []
    if (state := store.load()) is not None:
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        rows = state['rows']
        store.mark_best(_version(_best(rows)))
        on_epoch(rows)

    for epoch in range(len(rows), schedule.epochs):
        start = time.monotonic()
        # Dropout, stochastic depth and the like: other numbers than those that order the data.
        torch.manual_seed(seed_from(schedule.seed, epoch, 1))
        batches = _batches(splits, schedule, epoch)
        updates = epoch * updates_per_epoch
        train_loss = _train_epoch(model, batches, optimizer, scheduler, updates, f'{name} {epoch + 1}')
        test_loss, test_top1 = evaluate(model, splits, schedule)
        if not math.isfinite(test_loss):
            raise FloatingPointError(f'the test loss became {test_loss} after epoch {epoch + 1}; try a lower --lr')
        lr = max(group['lr'] for group in optimizer.param_groups)
        row = {'epoch': epoch + 1, 'lr': lr, 'train_loss': train_loss, 'test_loss': test_loss, 'test_top1': test_top1}
        rows.append({**row, 'seconds': round(time.monotonic() - start, 2)})
        state = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'rows': rows}
        state['label_names'] = list(splits.label_names)
        store.save(_version(epoch + 1), state, _version(_best(rows)), export)
        on_epoch(rows)
    return rows


def best_row(rows: list[Row]) -> Row:
    """The row of the best epoch: the first one of the highest test accuracy."""
    return max(rows, key=lambda row: row['test_top1'])


def _best(rows: list[Row]) -> int:
    return int(best_row(rows)['epoch'])


def _version(epoch: int) -> str:
    return f'epoch-{epoch:04d}'


def _batches(splits: Splits, schedule: Schedule, epoch: int) -> DataLoader[tuple[Tensor, int]]:
    on_gpu = torch.device(schedule.device).type == 'cuda'
    return create_batches(splits.train, epoch, schedule.batch_size, True, schedule.workers, pin_memory=on_gpu)


def _train_epoch(
    model: nn.Module, batches: DataLoader[tuple[Tensor, int]], optimizer: Any, scheduler: Any, updates: int, name: str
) -> float:
    """Train for one epoch that starts after so many ``updates``, and return the mean loss."""
    from tqdm import tqdm

    device = next(model.parameters()).device
    model.train()
    total = 0.0
    bar = tqdm(batches, desc=name, leave=False, disable=None, unit='batch')
    for done, (images, labels) in enumerate(bar, start=1):
        scheduler.step_update(updates + done - 1)
        loss = F.cross_entropy(model(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True))
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f'the training loss became {value} in update {updates + done}; try a lower --lr')
        total += value
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD_NORM)
        optimizer.step()
        bar.set_postfix(loss=f'{total / done:.3f}', refresh=False)
    return total / len(batches)


@torch.inference_mode()
def evaluate(model: nn.Module, splits: Splits, schedule: Schedule) -> tuple[float, float]:
    """Mean cross entropy and accuracy in [0, 1] on the test data."""
    device = next(model.parameters()).device
    model.eval()
    loss = torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.long, device=device)
    for images, labels in create_batches(splits.test, 0, schedule.batch_size, workers=schedule.workers):
        logits, targets = model(images.to(device)), labels.to(device)
        loss += F.cross_entropy(logits, targets, reduction='sum')
        correct += (logits.argmax(1) == targets).sum()
    return loss.item() / len(splits.test), correct.item() / len(splits.test)

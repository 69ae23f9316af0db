"""What a run reports: a line an epoch, a summary with its table, and a picture of where the patches look."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from timm_apvit.files import write_atomically
from timm_apvit.finetuning.checkpoints import BEST
from timm_apvit.finetuning.samples import Splits
from timm_apvit.finetuning.values import Budget, count, format_budget
from timm_apvit.models.mixin import APViT
from timm_apvit.pictures.figures import load_drawing
from timm_apvit.pictures.plots import plot_patches
from timm_apvit.pictures.views import statistics_of
from timm_apvit.results import METRICS, aligned, metric_in

Row = dict[str, float]

FIXED = 'fixed grid'  # name of the baseline
SUMMARY = 'summary.json'

PICTURED = 8
MOVED = ('patch_shift', 'patch_zoom', 'patch_turn', 'window_size', 'window_whole')


def display_name(model: str) -> str:
    """A model as people call it: by its name, or by the folder of the run or the repository that it comes from."""
    source, _, path = model.rpartition(':')
    parts = [part for part in Path(path).parts if part != BEST]
    return parts[-1] if source and parts else model


def best_row(rows: list[Row], monitor: str | None) -> Row:
    """The row of the best epoch: the first one of the highest test accuracy, or of the lowest loss."""
    key = monitor or 'test_top1'
    return max(rows, key=lambda row: row[key] * (-1 if 'loss' in key else 1))


@torch.inference_mode()
def save_picture(model: APViT, splits: Splits, path: Path) -> None:
    """Draw where the model looks in the test images."""
    images, labels = splits.test.some(PICTURED)
    logits, names = model.eval()(images), splits.label_names
    if splits.multi_label:
        read = [[[names[n] for n in row.nonzero().flatten().tolist()] for row in each] for each in (labels, logits > 0)]
    else:
        read = [[[names[n]] for n in each.tolist()] for each in (labels, logits.argmax(1))]
    titles = [f'{", ".join(own)}, read as {", ".join(found)}' for own, found in zip(*read, strict=True)]
    mean, std = statistics_of(model)
    pixels = (images * std + mean).clamp(0, 1)
    figure = plot_patches(model, pixels, panels=('image', 'outlines'), titles=titles, images_per_row=2)
    write_atomically(path, load_drawing().file_bytes(figure))


def epoch_line(row: Row, epochs: int) -> str:
    """What came of an epoch: losses by name, accuracy at each budget, and how far patches moved."""
    metric = metric_in(row, 'test_')
    each = [
        f'{name.removeprefix(f"test_{metric}_")}: {value:.3f}' for name, value in row.items() if f'{metric}_' in name
    ]
    terms = [f'{k[6:-5]} {v:.3f}' for k, v in row.items() if k.startswith('train_') and k != 'train_loss']
    moves = [f'{name.partition("_")[2]} {row[name]:.2f}' for name in MOVED if name in row]
    return (
        f'epoch {row["epoch"]:>3}/{epochs}  train loss {row["train_loss"]:.3f}'
        f'{" (" + ", ".join(terms) + ")" if terms else ""}  test loss {row["test_loss"]:.3f}  '
        f'{METRICS[metric]} {row[f"test_{metric}"]:.3f}{" (" + ", ".join(each) + ")" if each else ""}  '
        f'{" ".join(moves) + "  " if moves else ""}{row["seconds"]:.1f} s'
    )


def summarise(rows: list[Row], budgets: Sequence[Budget], monitor: str | None) -> dict[str, Any]:
    """What came of a training.

    Args:
        rows: of its epochs.
        budgets: numbers of patches that it was tested at.
        monitor: what the best epoch is best in.

    Returns:
        ``top1`` (or ``map``) of the last and ``best_top1`` of the best epoch, ``best_epoch``, ``seconds``, and
        ``num_patches``; with several budgets that is their list, the accuracies are means over them, and ``budgets``
        has for each its own.
    """
    last, best = rows[-1], best_row(rows, monitor)
    metric = metric_in(last, 'test_')
    summary: dict[str, Any] = {
        'num_patches': count(budgets[0]) if len(budgets) == 1 else [count(each) for each in budgets],
        metric: last[f'test_{metric}'],
        f'best_{metric}': best[f'test_{metric}'],
        'best_epoch': best['epoch'],
        'seconds': round(sum(row['seconds'] for row in rows), 1),
    }
    if len(budgets) > 1:
        summary['budgets'] = {
            name: {
                'num_patches': count(each),
                metric: last[f'test_{metric}_{name}'],
                f'best_{metric}': best[f'test_{metric}_{name}'],
            }
            for each, name in ((each, format_budget(each)) for each in budgets)
        }
    return summary


def table(summary: dict[str, dict[str, Any]]) -> str:
    """Accuracy, tokens and time of each contestant, a line for each of its budgets."""
    metric = metric_in(next(iter(summary.values())))
    rows = [
        [
            name,
            str(each['num_patches']),
            f'{each[metric]:.3f}',
            f'{each[f"best_{metric}"]:.3f}',
            f'{row["seconds"]:.0f}',
        ]
        for name, row in summary.items()
        for each in row.get('budgets', {'': row}).values()
    ]
    return aligned(('', 'patches', METRICS[metric], f'best {METRICS[metric]}', 'seconds'), rows)

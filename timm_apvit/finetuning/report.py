"""What a run reports: a line an epoch, a summary with its table, and a picture of where the patches look."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from timm_apvit.files import replacing
from timm_apvit.finetuning.batches import Splits, some_samples
from timm_apvit.finetuning.loop import Row, best_row
from timm_apvit.models.mixin import APViT
from timm_apvit.pictures.figures import load_drawing
from timm_apvit.pictures.plots import plot_patches
from timm_apvit.results import aligned

PICTURED = 8
MOVED = ('patch_shift', 'patch_zoom', 'patch_turn', 'window_size', 'window_whole')


@torch.inference_mode()
def save_picture(model: APViT, splits: Splits, data_config: dict[str, Any], path: Path) -> None:
    """Draw where the model looks in the test images."""
    model.eval()
    samples = some_samples(splits.test, PICTURED)
    images = torch.stack([image for image, _ in samples])
    predicted = model(images).argmax(1).tolist()
    titles = [
        f'{splits.label_names[label]}, read as {splits.label_names[guess]}'
        for (_, label), guess in zip(samples, predicted, strict=True)
    ]
    mean, std = (torch.tensor(data_config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    pixels = (images * std + mean).clamp(0, 1)
    figure = plot_patches(model, pixels, panels=('image', 'outlines'), titles=titles, images_per_row=2)
    with replacing(path) as unfinished:
        unfinished.write_bytes(load_drawing().file_bytes(figure))


def epoch_line(row: Row, epochs: int) -> str:
    """What came of an epoch: losses by name, accuracy at each budget, and how far patches moved."""
    each = [f'{name.removeprefix("test_top1_")}: {value:.3f}' for name, value in row.items() if 'top1_' in name]
    terms = [f'{k[6:-5]} {v:.3f}' for k, v in row.items() if k.startswith('train_') and k != 'train_loss']
    moves = [f'{name.partition("_")[2]} {row[name]:.2f}' for name in MOVED if name in row]
    return (
        f'epoch {row["epoch"]:>3}/{epochs}  train loss {row["train_loss"]:.3f}'
        f'{" (" + ", ".join(terms) + ")" if terms else ""}  test loss {row["test_loss"]:.3f}  '
        f'top-1 {row["test_top1"]:.3f}{" (" + ", ".join(each) + ")" if each else ""}  '
        f'{" ".join(moves) + "  " if moves else ""}{row["seconds"]:.1f} s'
    )


def summarise(rows: list[Row], budgets: Sequence[tuple[int, str]], monitor: str) -> dict[str, Any]:
    """What came of a training.

    Args:
        rows: of its epochs.
        budgets: number of patches and name of each budget.
        monitor: what the best epoch is best in.

    Returns:
        ``top1`` of the last and ``best_top1`` of the best epoch, ``best_epoch``, ``seconds``, and ``num_patches``; with
        several budgets that is their list, the accuracies are means over them, and ``budgets`` has for each its own.
    """
    last, best = rows[-1], best_row(rows, monitor)
    summary: dict[str, Any] = {
        'num_patches': budgets[0][0] if len(budgets) == 1 else [number for number, _ in budgets],
        'top1': last['test_top1'],
        'best_top1': best['test_top1'],
        'best_epoch': best['epoch'],
        'seconds': round(sum(row['seconds'] for row in rows), 1),
    }
    if len(budgets) > 1:
        summary['budgets'] = {
            name: {
                'num_patches': number,
                'top1': last[f'test_top1_{name}'],
                'best_top1': best[f'test_top1_{name}'],
            }
            for number, name in budgets
        }
    return summary


def table(summary: dict[str, dict[str, Any]]) -> str:
    """Accuracy, tokens and time of each contestant, a line for each of its budgets."""
    rows = [
        [
            name,
            str(each['num_patches']),
            *(f'{each[key]:.3f}' for key in ('top1', 'best_top1')),
            f'{row["seconds"]:.0f}',
        ]
        for name, row in summary.items()
        for each in row.get('budgets', {'': row}).values()
    ]
    return aligned(('', 'patches', 'top-1', 'best top-1', 'seconds'), rows)

"""The evaluation command: accuracy, cost and speed of models at each of several budgets."""

import argparse
import csv
import io
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from timm_apvit import __version__
from timm_apvit.failures import FailedError, explain, refusing
from timm_apvit.files import check_writable, replacing, write_atomically
from timm_apvit.finetuning.batches import Splits, some_samples
from timm_apvit.finetuning.config import resumed_settings
from timm_apvit.finetuning.evaluation import autocast, evaluate, images_per_second, multiply_adds
from timm_apvit.finetuning.folders import shown
from timm_apvit.finetuning.models import MODEL_HELP, load_model, load_weights
from timm_apvit.finetuning.processes import check_device
from timm_apvit.finetuning.settings import CONFIG_FILE, DATA_HELP, OF_DATA, Settings, add_settings
from timm_apvit.finetuning.sources import load_splits
from timm_apvit.finetuning.values import Budget, count, format_budget, number, parse_num_patches, parse_size
from timm_apvit.models.mixin import APViT
from timm_apvit.pictures.figures import load_drawing
from timm_apvit.pictures.images import image_config
from timm_apvit.results import aligned, results_cells

OF_TRAINING = {'data', 'train_split', 'train_samples'}
TO_LOWER = 'lower --batch-size, --num-patches or --img-size, or add --amp bfloat16'
COUNTED = 'multiply-adds: of matrix products, convolutions and attention for an image; sampling and sums not counted'


class Subject(NamedTuple):
    """What is evaluated.

    Attributes:
        name: of the model.
        model: in eval mode, on its device.
        splits: of which the test data are used.
        budgets: to evaluate it at; that of a fixed grid is the only one of its model.
        batch_size: of the accuracy, and of the second speed.
        workers: processes that load data.
        amp: data type of the computation.
    """

    name: str
    model: nn.Module
    splits: Splits
    budgets: tuple[Budget, ...]
    batch_size: int
    workers: int
    amp: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser, which then returns only those that are given."""
    parser.argument_default = argparse.SUPPRESS
    counted = number(int, 1)
    parser.add_argument('model', metavar='MODEL', help=f'{MODEL_HELP}, or those of --checkpoint; ViTs of timm too')
    parser.add_argument('data', nargs='?', metavar='DATA', help=f"{DATA_HELP}, or the run's own")
    add = parser.add_argument_group('evaluation').add_argument
    add('--checkpoint', metavar='FILE', help='weights for a registered model (default: its pretrained ones)')
    add('--beside', metavar='MODEL', action='append', help='another model, in rows beside; may be repeated')
    add(
        '--num-patches',
        type=parse_num_patches,
        metavar='N[,N...]',
        help="numbers of patches, or GHxGW, to evaluate (default: those of the run, or the model's own)",
    )
    add('--img-size', type=parse_size, metavar='PIXELS', help="side of the images, or HxW (default: the model's own)")
    add('--batch-size', type=counted, help='(default: 64; it does not change the accuracy)')
    add('--amp', choices=('bfloat16', 'float16'), help='compute in 16 bits (default: in 32, to be exact)')
    add('--json', metavar='FILE', help='write the results there too (default: none)')
    add('--per-class', metavar='FILE.csv', help='write images and accuracy of each class, at the last budget')
    add('--confusion', metavar='FILE', help='write how often which class was taken for which: .csv, or a picture')
    add('--workers', type=number(int, 0), help='processes that load data (default: 0, to leave the CPU to the model)')
    add('--threads', type=counted, help="of computation on the CPU (default: PyTorch's own)")
    add('--device', help='cpu, cuda, cuda:1, ... (default: cuda if there is one)')
    add_settings(parser, [name for name in OF_DATA if name not in OF_TRAINING])


def run(given: dict[str, Any]) -> None:
    """Measure, print and write."""
    with refusing():
        for name in ('json', 'per_class', 'confusion'):
            if given.get(name) is not None:
                check_writable(given[name])
        subjects = [load_subject(given), *(load_subject(given, other) for other in given.get('beside', ()))]
    try:
        rows, confusion = [], torch.zeros(0)
        for subject in subjects:
            for budget in subject.budgets:
                row, found = measure(subject, budget)
                rows.append({'model': subject.name, **row} if len(subjects) > 1 else row)
                confusion = found if subject is subjects[0] else confusion
    except (OSError, RuntimeError, MemoryError, ValueError) as error:
        raise FailedError(explain(error, TO_LOWER)) from error
    titles, cells = results_cells(rows)
    sys.stdout.write(f'{aligned(titles, cells)}\n{rows[0]["images"]} images; {COUNTED}\n')
    if given.get('json') is not None:
        write_atomically(Path(given['json']), json.dumps(report(given, subjects[0], rows), indent=2) + '\n')
    names = subjects[0].splits.label_names
    if given.get('per_class') is not None:
        right, totals = confusion.diagonal().int().tolist(), confusion.sum(dim=1).int().tolist()
        each = [(*row[:2], f'{row[2] / max(row[1], 1):.4f}') for row in zip(names, totals, right, strict=True)]
        write_csv(Path(given['per_class']), [('class', 'images', 'top1'), *each])
    if given.get('confusion') is not None:
        write_confusion(Path(given['confusion']), confusion, names)


def load_subject(given: dict[str, Any], other: str | None = None) -> Subject:
    """Check the options and load the model, or another one for the same data, and the data.

    Raises:
        ValueError, OSError, ModuleNotFoundError: bad input, or an extra is missing.
    """
    name, amp = other or given['model'], given.get('amp')
    device = check_device(given.get('device') or ('cuda' if torch.cuda.is_available() else 'cpu'), amp)
    if given.get('threads') is not None:
        torch.set_num_threads(given['threads'])
    run = Path(given['model'])
    is_run = (run / CONFIG_FILE).is_file()
    if not is_run and given.get('data') is None:
        raise ValueError(f"expected DATA, or a run's folder, which knows its own, got {given['model']!r} alone")
    settings = resumed_settings(run, {}) if is_run else Settings()
    checkpoint = given.get('checkpoint') if other is None else None
    model = load_model(name, any_vit=True) if checkpoint is None else load_weights(name, checkpoint)
    source = settings if given.get('data') is None else Settings()
    source = replace(source, **{name: given[name] for name in ('data', *OF_DATA) if name in given})
    data_config = image_config(model)
    if given.get('img_size') is not None:
        size = given['img_size']
        data_config['input_size'] = (data_config['input_size'][0], *((size, size) if isinstance(size, int) else size))
    workers, own = given.get('workers', 0), getattr(model, 'pretrained_cfg').get('label_names')  # noqa: B009
    splits = load_splits(source, data_config, max(1, workers), True, None if own is None else tuple(own))
    _check_classes(model, own, splits)
    for key, value in model.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f'expected finite weights, got others in {key} of {name!r}')
    if isinstance(model, APViT):
        budgets = (
            given.get('num_patches') or settings.num_patches or (model.patch_embed.requested or model.num_patches,)
        )
    else:
        budgets = (int(getattr(model, 'patch_embed').num_patches),)  # noqa: B009
    return Subject(name, model.to(device).eval(), splits, budgets, given.get('batch_size', 64), workers, amp)


def _check_classes(model: Any, own: Sequence[str] | None, splits: Splits) -> None:
    """Raise ValueError unless the data have the classes that the model tells apart, in its order."""
    names = splits.label_names
    if len(names) != model.num_classes:
        has = f'data of {model.num_classes} classes, as the model has'
        raise ValueError(f'expected {has}, got {len(names)}: {shown(names)}')
    if own is not None and set(own) == set(names) and tuple(own) != names:
        raise ValueError(
            f'expected the classes in the order of the model, {shown(own)}, got {shown(names)}; --class-map gives it'
        )


def measure(subject: Subject, budget: Budget) -> tuple[dict[str, Any], Tensor]:
    """Accuracy, cost and speed at a budget.

    Returns:
        ``budget``, ``num_patches``, ``top1``, ``top5`` (of more than five classes) and ``loss`` on ``images`` images,
        ``multiply_adds`` of one image, and ``images_per_second`` by batch size; and how often a class (row) was taken
        for which (column), ``(classes, classes)``.
    """
    model, amp, classes = subject.model, subject.amp, len(subject.splits.label_names)
    confusion = torch.zeros(classes * classes)

    def look(logits: Tensor, labels: Tensor) -> None:
        pairs = labels * classes + logits.argmax(dim=1)
        confusion.add_(pairs.bincount(minlength=classes * classes).cpu())

    if isinstance(model, APViT):
        model.set_num_patches(budget)
    scores = evaluate(model, subject.splits, subject.batch_size, subject.workers, amp, look=look)._asdict()
    if classes <= 5:
        del scores['top5']
    device = next(model.parameters()).device
    samples = [image for image, _ in some_samples(subject.splits.test, subject.batch_size)]
    images = torch.stack([samples[n % len(samples)] for n in range(subject.batch_size)]).to(device)
    speeds = {
        str(size): images_per_second(lambda size=size: _forward(model, images[:size], amp), size)  # type: ignore[misc]
        for size in dict.fromkeys((1, subject.batch_size))
    }
    counts = {'multiply_adds': multiply_adds(model, images[:1]), 'images_per_second': speeds}
    row = {'budget': format_budget(budget), 'num_patches': count(budget), **scores, **counts}
    return row, confusion.reshape(classes, classes)


@torch.inference_mode()
def _forward(model: nn.Module, images: Tensor, amp: str | None) -> None:
    with autocast(images.device, amp):
        model(images)


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write a table as CSV."""
    text = io.StringIO(newline='')
    csv.writer(text, lineterminator='\n').writerows(rows)
    write_atomically(path, text.getvalue())


def write_confusion(path: Path, confusion: Tensor, names: Sequence[str]) -> None:
    """Write how often a class was taken for which, as CSV or as a picture."""
    counts = confusion.int().tolist()
    if path.suffix.lower() == '.csv':
        return write_csv(path, [('class', *names), *((name, *row) for name, row in zip(names, counts, strict=True))])
    drawing = load_drawing()
    from matplotlib.figure import Figure

    side = 3 + min(0.25 * len(names), 12)
    figure = Figure(figsize=(side, side), layout='constrained')
    axis = figure.subplots()
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    axis.imshow(shares.numpy(), cmap='Blues', vmin=0, vmax=1)
    axis.set(xlabel='taken for', ylabel='class', xticks=range(len(names)), yticks=range(len(names)))
    axis.set_xticklabels(names, rotation=90)
    axis.set_yticklabels(names)
    with replacing(path) as unfinished:
        unfinished.write_bytes(drawing.file_bytes(figure, path.suffix[1:].lower() or 'png', 100))
    return None


def processor() -> str:
    """What the processor is called, where the system says it."""
    known = Path('/proc/cpuinfo')  # Linux
    lines = known.read_text().splitlines() if known.is_file() else []
    names = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(names, platform.processor() or platform.machine())


def report(given: dict[str, Any], subject: Subject, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The results with what they were measured on."""
    device = next(subject.model.parameters()).device
    return {
        'options': given,
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else processor(),
        'threads': torch.get_num_threads(),
        'versions': {'timm_apvit': __version__, 'timm': timm.__version__, 'torch': torch.__version__},
        'counted': COUNTED,
        'rows': rows,
    }

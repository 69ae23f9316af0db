"""The evaluation command: accuracy, cost and speed of models at each of several budgets."""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from timm_apvit import __version__
from timm_apvit.cli.options import BATCH_SIZE, add_settings, add_shared, load
from timm_apvit.failures import listed
from timm_apvit.files import check_writable, write_atomically, write_csv
from timm_apvit.finetuning.baseline import resizing, source_size
from timm_apvit.finetuning.config import settings_of_run
from timm_apvit.finetuning.evaluation import autocast, evaluate, images_per_second, multiply_adds
from timm_apvit.finetuning.image_files import check_is_folder
from timm_apvit.finetuning.models import MODEL_HELP, address_of, folder_of, with_images
from timm_apvit.finetuning.preparation import check_budgets
from timm_apvit.finetuning.samples import Splits
from timm_apvit.finetuning.settings import DATA_HELP, OF_DATA, Settings
from timm_apvit.finetuning.sources import is_path, load_splits
from timm_apvit.finetuning.streams import reader_of
from timm_apvit.finetuning.values import Budget, count, format_budget, parse_num_patches, text
from timm_apvit.hub.labels import is_multi_label, own_label_names
from timm_apvit.models.mixin import APViT
from timm_apvit.pictures.figures import check_picture, load_drawing
from timm_apvit.pictures.images import image_config
from timm_apvit.results import aligned, results_cells

OF_TRAINING = {'data', 'train_split', 'train_samples'}
COUNTED = 'multiply-adds: of matrix products, convolutions and attention for an image; sampling and sums not counted'


class Evaluated(NamedTuple):
    """What is evaluated.

    Attributes:
        name: of the model.
        model: in eval mode, on its device.
        splits: of which the test data are used.
        budgets: to evaluate it at; that of a fixed grid is the only one of its model.
    """

    name: str
    model: nn.Module
    splits: Splits
    budgets: tuple[Budget, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    parser.add_argument('model', metavar='MODEL', help=f'{MODEL_HELP}, or those of --checkpoint; ViTs of timm too')
    parser.add_argument('data', type=text, nargs='?', metavar='DATA', help=f"{DATA_HELP}, or the run's own")
    group = parser.add_argument_group('evaluation')
    add = group.add_argument
    add('--beside', metavar='MODEL', action='append', help='another model, in rows beside; may be repeated')
    add(
        '--num-patches',
        type=parse_num_patches,
        metavar='N[,N...]',
        help="numbers of patches, or GHxGW, to evaluate (default: those of the run, or the model's own)",
    )
    add('--json', metavar='FILE', help='write the results there too (default: none)')
    add('--per-class', metavar='FILE.csv', help='write images and accuracy of each class, at the last budget')
    add('--confusion', metavar='FILE', help='write how often which class was taken for which: .csv, or a picture')
    add_shared(group, 'checkpoint', 'img_size', 'batch_size', 'amp', 'workers', 'threads', 'device')
    add_settings(parser, [name for name in OF_DATA if name not in OF_TRAINING])


def prepare(given: dict[str, Any]) -> Callable[[], None]:
    """Load the models and the data, of which the work measures, prints and writes."""
    for name in ('json', 'per_class', 'confusion'):
        if name in given:
            check_writable(given[name])
    if 'confusion' in given and Path(given['confusion']).suffix.lower() != '.csv':
        check_picture('--confusion', given['confusion'], also=('csv',))
    first = load_evaluated(given)
    same = {**given, 'multi_label': first.splits.multi_label}
    entries = [first, *(load_evaluated(same, other) for other in given.get('beside', ()))]
    counted = [name for name in ('per_class', 'confusion') if name in given]
    if counted and entries[0].splits.multi_label:
        raise ValueError('expected data of one label to an image for --per-class and --confusion, got several labels')
    return lambda: measure_all(given, entries, bool(counted))


def measure_all(given: dict[str, Any], entries: Sequence[Evaluated], counted: bool) -> None:
    """Measure, print and write."""
    rows: list[dict[str, Any]] = []
    options = {name: given[name] for name in ('batch_size', 'workers', 'amp') if name in given}
    names, confusion = entries[0].splits.label_names, torch.zeros(0)
    for entry in entries:
        for budget in entry.budgets:
            row, found = measure(entry, budget, counted and entry is entries[0], **options)
            rows.append({'model': entry.name, **row} if len(entries) > 1 else row)
            confusion = confusion if found is None else found
    titles, cells = results_cells(rows)
    sys.stdout.write(f'{aligned(titles, cells)}\n{rows[0]["images"]} images; {COUNTED}\n')
    if 'json' in given:
        write_atomically(Path(given['json']), json.dumps(report(given, entries[0], rows), indent=2) + '\n')
    if 'per_class' in given:
        right, totals = confusion.diagonal().tolist(), confusion.sum(dim=1).tolist()
        each = [(*row[:2], f'{row[2] / max(row[1], 1):.4f}') for row in zip(names, totals, right, strict=True)]
        write_csv(Path(given['per_class']), [('class', 'images', 'top1'), *each])
    if 'confusion' in given:
        write_confusion(Path(given['confusion']), confusion, names)


def load_evaluated(given: dict[str, Any], other: str | None = None) -> Evaluated:
    """Check the options and load the model, or another one for the same data, and the data."""
    name = other or given['model']
    address_of(name)  # which says what is wrong with it before anything is loaded
    run, data = settings_of_run(given['model']), given.get('data')
    if run is None and data is None:
        raise ValueError(f"expected DATA, or a run's folder, which knows its own, got {given['model']!r} alone")
    if data is not None and is_path(data):
        check_is_folder(Path(data))
    options = given if other is None else {**given, 'model': name, 'checkpoint': None}
    model = load(options, any_vit=True)
    source = run if run is not None and data is None else Settings()
    source = replace(source, **{name: given[name] for name in ('data', *OF_DATA) if name in given})
    if source.data is not None and reader_of(source.data) is None and 'multi_label' not in given:
        source = replace(source, multi_label=source.multi_label or is_multi_label(model))
    data_config = image_config(with_images(model, source) if other is None else model)  # another has its own
    model, size = with_size(model, name, given.get('img_size'))
    if size is not None:
        data_config['input_size'] = (data_config['input_size'][0], *((size, size) if isinstance(size, int) else size))
    workers, own = given.get('workers', 0), own_label_names(model)
    splits = load_splits(source, data_config, max(1, workers), True, None if own is None else tuple(own))
    check_classes(model, own, splits)
    for key, value in model.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f'expected finite weights, got others in {key} of {name!r}')
    if isinstance(model, APViT):
        of_run = run.num_patches if run is not None and other is None else None
        budgets = given.get('num_patches') or of_run or (model.patch_embed.own_budget,)
        check_budgets(budgets, data_config['input_size'][1] * data_config['input_size'][2])
        for budget in budgets:  # that it can have them
            model.set_num_patches(budget)
    elif other is None and 'num_patches' in given:
        raise ValueError(f'expected an APViT for --num-patches, got {name!r}, which is a {type(model).__name__}')
    else:
        budgets = (int(model.patch_embed.num_patches),)
    return Evaluated(name, model, splits, budgets)


def with_size(model: Any, name: str, size: Any) -> tuple[Any, Any]:
    """The model for images of a size, None: its own, and the size; a fixed grid of a run resizes as in its training."""
    directory = folder_of(name)
    trained = None if directory is None else source_size(directory)
    if not isinstance(model, APViT) and trained is not None:
        return resizing(model), trained
    if not isinstance(model, APViT) and size is not None:
        model.set_input_size(img_size=size)
    return model, size


def check_classes(model: Any, own: Sequence[str] | None, splits: Splits) -> None:
    """Raise ValueError unless the data have the classes that the model tells apart, in its order."""
    names = splits.label_names
    if len(names) != model.num_classes:
        has = f'data of {model.num_classes} classes, as the model has'
        raise ValueError(f'expected {has}, got {len(names)}: {listed(names)}')
    if own is not None and set(own) == set(names) and tuple(own) != names:
        raise ValueError(
            f'expected the classes in the order of the model, {listed(own)}, got {listed(names)}; --class-map gives it'
        )


def measure(
    entry: Evaluated,
    budget: Budget,
    counted: bool = False,
    batch_size: int = BATCH_SIZE,
    workers: int = 0,
    amp: str | None = None,
) -> tuple[dict[str, Any], Tensor | None]:
    """Accuracy, cost and speed at a budget.

    Returns:
        ``budget``, ``num_patches``, what `evaluate` finds, ``multiply_adds`` of one image, and ``images_per_second`` by
        batch size; and, if they are counted, how often a class (row) was taken for which (column).
    """
    model, classes = entry.model, len(entry.splits.label_names)
    confusion = torch.zeros(classes * classes, dtype=torch.int64) if counted else None

    def add(logits: Tensor, labels: Tensor) -> None:
        pairs = labels * classes + logits.argmax(dim=1)
        confusion.add_(pairs.bincount(minlength=classes * classes).cpu())  # type: ignore[union-attr]

    if isinstance(model, APViT):
        model.set_num_patches(budget)
    found = evaluate(model, entry.splits, batch_size, workers, amp, each=add if counted else None)
    samples, _ = entry.splits.test.some(batch_size)
    images = samples[torch.arange(batch_size) % len(samples)].to(next(model.parameters()).device)
    speeds = {
        str(size): images_per_second(lambda size=size: _forward(model, images[:size], amp), size)  # type: ignore[misc]
        for size in dict.fromkeys((1, batch_size))
    }
    counts = {'multiply_adds': multiply_adds(model, images[:1]), 'images_per_second': speeds}
    row = {'budget': format_budget(budget), 'num_patches': count(budget), **found, **counts}
    return row, None if confusion is None else confusion.reshape(classes, classes)


@torch.inference_mode()
def _forward(model: nn.Module, images: Tensor, amp: str | None) -> None:
    with autocast(images.device, amp):
        model(images)


def write_confusion(path: Path, confusion: Tensor, names: Sequence[str]) -> None:
    """Write how often a class was taken for which, as CSV or as a picture."""
    if path.suffix.lower() == '.csv':
        rows = zip(names, confusion.tolist(), strict=True)
        return write_csv(path, [('class', *names), *((name, *row) for name, row in rows)])
    from matplotlib.figure import Figure

    side = 3 + min(0.25 * len(names), 12)
    figure = Figure(figsize=(side, side), layout='constrained')
    axis = figure.subplots()
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    axis.imshow(shares.numpy(), cmap='Blues', vmin=0, vmax=1)
    axis.set(xlabel='taken for', ylabel='class', xticks=range(len(names)), yticks=range(len(names)))
    axis.set_xticklabels(names, rotation=90)
    axis.set_yticklabels(names)
    write_atomically(path, load_drawing().file_bytes(figure, path.suffix[1:].lower(), 100))
    return None


def processor() -> str:
    """What the processor is called, where the system says it."""
    known = Path('/proc/cpuinfo')  # Linux
    lines = known.read_text().splitlines() if known.is_file() else []
    names = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(names, platform.processor() or platform.machine())


def report(given: dict[str, Any], entry: Evaluated, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The results with what they were measured on."""
    device = next(entry.model.parameters()).device
    return {
        'options': given,
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else processor(),
        'threads': torch.get_num_threads(),
        'versions': {'timm_apvit': __version__, 'timm': timm.__version__, 'torch': torch.__version__},
        'counted': COUNTED,
        'rows': rows,
    }

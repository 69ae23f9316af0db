"""The evaluation command: accuracy, cost and speed of a model at each of several budgets."""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_apvit import __version__
from timm_apvit.failures import explain
from timm_apvit.files import check_writable, write_atomically
from timm_apvit.finetuning.checkpoints import CONFIG_FILE
from timm_apvit.finetuning.config import resumed_options
from timm_apvit.finetuning.data import Splits, some_samples
from timm_apvit.finetuning.data_options import DATA_HELP, DataOptions, add_data_arguments
from timm_apvit.finetuning.evaluation import autocast, evaluate
from timm_apvit.finetuning.folders import shown
from timm_apvit.finetuning.models import load_model, load_weights
from timm_apvit.finetuning.options import Options
from timm_apvit.finetuning.parsing import Budget, count, format_budget, number, parse_num_patches
from timm_apvit.finetuning.preparation import checked_device
from timm_apvit.finetuning.sources import load_test
from timm_apvit.models.mixin import APViT
from timm_apvit.pictures.images import image_config

DATA_NAMES = {field.name for field in fields(DataOptions)}
SECONDS = 1.0  # that each speed is measured for, at least
TO_LOWER = 'lower --batch-size, --num-patches or --img-size, or add --amp bfloat16'
COUNTED = 'multiply-adds: of matrix products, convolutions and attention for an image; sampling and sums not counted'


class Subject(NamedTuple):
    """What is evaluated.

    Attributes:
        model: in eval mode, on its device.
        splits: of which the test data are used.
        budgets: to evaluate it at.
        batch_size: of the accuracy, and of the second speed.
        workers: processes that load data.
        amp: data type of the computation.
    """

    model: APViT
    splits: Splits
    budgets: tuple[Budget, ...]
    batch_size: int
    workers: int
    amp: str | None


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser, which then returns only those that are given."""
    parser.argument_default = argparse.SUPPRESS
    counted = number(int, 1)
    parser.add_argument(
        'model',
        metavar='MODEL',
        help="folder of a run (its best model) or of a saved model, a model's name on the Hugging Face Hub, or a "
        "registered model's name, with its pretrained weights or those of --checkpoint",
    )
    parser.add_argument('data', nargs='?', metavar='DATA', help=f"{DATA_HELP}, or the run's own")
    add = parser.add_argument_group('evaluation').add_argument
    add('--checkpoint', metavar='FILE', help='weights for a registered model (default: its pretrained ones)')
    add(
        '--num-patches',
        type=parse_num_patches,
        metavar='N[,N...]',
        help="numbers of patches, or GHxGW, to evaluate (default: those of the run, or the model's own)",
    )
    add('--img-size', type=counted, metavar='PIXELS', help="side of the images (default: the model's own)")
    add('--batch-size', type=counted, help='(default: 64; it does not change the accuracy)')
    add('--amp', choices=('bfloat16', 'float16'), help='compute in 16 bits (default: in 32, to be exact)')
    add('--json', metavar='FILE', help='write the results there too (default: none)')
    add('--workers', type=number(int, 0), help='processes that load data (default: 0, to leave the CPU to the model)')
    add('--threads', type=counted, help="of computation on the CPU (default: PyTorch's own)")
    add('--device', help='cpu, cuda, cuda:1, ... (default: cuda if there is one)')
    add_data_arguments(parser, training=False)


def evaluate_command(given: dict[str, Any]) -> int:
    """Run the command with the options given; return the exit status."""
    try:
        return _evaluate(given)
    except KeyboardInterrupt:
        sys.stderr.write('interrupted; nothing was written\n')
        return 130


def _evaluate(given: dict[str, Any]) -> int:
    """Measure, print and write; return the exit status."""
    try:
        subject = load_subject(given)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f'error: {error}\n')
        return 2
    try:
        rows = [measure(subject, budget) for budget in subject.budgets]
        sys.stdout.write(table(rows, subject.batch_size) + '\n')
        if given.get('json') is not None:
            write_atomically(Path(given['json']), json.dumps(report(given, subject, rows), indent=2) + '\n')
    except (OSError, RuntimeError, MemoryError, ValueError) as error:
        sys.stderr.write(f'error: {explain(error, TO_LOWER)}\n')
        return 1
    return 0


def load_subject(given: dict[str, Any]) -> Subject:
    """Check the options and load the model and the data.

    Raises:
        ValueError, OSError, ModuleNotFoundError: bad input, or an extra is missing.
    """
    amp = given.get('amp')
    device = checked_device(given.get('device') or ('cuda' if torch.cuda.is_available() else 'cpu'), amp)
    if given.get('threads') is not None:
        torch.set_num_threads(given['threads'])
    if given.get('json') is not None:
        check_writable(given['json'])
    run = Path(given['model'])
    is_run = (run / CONFIG_FILE).is_file()
    if not is_run and given.get('data') is None:
        raise ValueError(f"expected DATA, or a run's folder, which knows its own, got {given['model']!r} alone")
    options = resumed_options(run, {}) if is_run else Options()
    checkpoint = given.get('checkpoint')
    model = load_model(given['model']) if checkpoint is None else load_weights(given['model'], checkpoint)
    source = options if given.get('data') is None else Options()
    source = replace(source, **{name: given[name] for name in DATA_NAMES if name in given})
    data_config = image_config(model)
    if given.get('img_size') is not None:
        data_config['input_size'] = (data_config['input_size'][0], given['img_size'], given['img_size'])
    workers = given.get('workers', 0)
    label_names = model.pretrained_cfg.get('label_names')
    splits = load_test(source, data_config, workers, None if label_names is None else tuple(label_names))
    _check_classes(model, splits)
    budgets = given.get('num_patches') or options.num_patches or (model.patch_embed.requested or model.num_patches,)
    return Subject(model.to(device).eval(), splits, budgets, given.get('batch_size', 64), workers, amp)


def _check_classes(model: APViT, splits: Splits) -> None:
    """Raise ValueError unless the data have the classes that the model tells apart, in its order."""
    own, names = model.pretrained_cfg.get('label_names'), splits.label_names
    if len(names) != model.num_classes:
        has = f'data of {model.num_classes} classes, as the model has'
        raise ValueError(f'expected {has}, got {len(names)}: {shown(names)}')
    if own is not None and set(own) == set(names) and tuple(own) != names:
        raise ValueError(
            f'expected the classes in the order of the model, {shown(own)}, got {shown(names)}; --class-map gives it'
        )


def measure(subject: Subject, budget: Budget) -> dict[str, Any]:
    """Accuracy, cost and speed at a budget.

    Returns:
        ``budget``, ``num_patches``, ``top1``, ``top5`` and ``loss`` on ``images`` images, ``multiply_adds`` of one
        image, and ``images_per_second`` by batch size.
    """
    model, amp = subject.model, subject.amp
    model.set_num_patches(budget)
    scores = evaluate(model, subject.splits, subject.batch_size, subject.workers, amp)
    device = next(model.parameters()).device
    samples = [image for image, _ in some_samples(subject.splits.test, subject.batch_size)]
    images = torch.stack([samples[n % len(samples)] for n in range(subject.batch_size)]).to(device)
    speeds = {
        str(size): images_per_second(lambda size=size: _forward(model, images[:size], amp), size)  # type: ignore[misc]
        for size in dict.fromkeys((1, subject.batch_size))
    }
    return {
        'budget': format_budget(budget),
        'num_patches': count(budget),
        **scores._asdict(),
        'multiply_adds': multiply_adds(model, images[:1]),
        'images_per_second': speeds,
    }


def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of a forward: of matrix products, convolutions and attention, as torch's own counter has them."""
    # On the CPU that counter does not know fused attention.
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images)
    return int(counter.get_total_flops()) // 2


def images_per_second(forward: Callable[[], Any], images: int, seconds: float | None = None) -> float:
    """Speed of a forward of so many images: of the median of runs of ``seconds`` in all, after a warm-up."""
    from torch.utils.benchmark import Timer

    timer = Timer('forward()', globals={'forward': forward}, num_threads=torch.get_num_threads())
    timing = timer.blocked_autorange(min_run_time=SECONDS if seconds is None else seconds)
    return images / float(timing.median)


@torch.inference_mode()
def _forward(model: nn.Module, images: Tensor, amp: str | None) -> None:
    with autocast(images.device, amp):
        model(images)


def table(rows: Sequence[dict[str, Any]], batch_size: int) -> str:
    """The results, a line for each budget."""
    batches = f'in batches of {batch_size}'
    lines = [f'patches  top-1  top-5    loss  M multiply-adds  images/s alone  {batches}']
    for row in rows:
        alone, batched = (row['images_per_second'][str(size)] for size in (1, batch_size))
        lines.append(
            f'{row["budget"]:>7}  {row["top1"]:.3f}  {row["top5"]:.3f}  {row["loss"]:>6.3f}  '
            f'{row["multiply_adds"] / 1e6:>15.1f}  {alone:>14.1f}  {batched:>{len(batches)}.1f}'
        )
    return '\n'.join([*lines, f'{rows[0]["images"]} images; {COUNTED}'])


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

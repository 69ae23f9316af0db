"""Do adaptive patches pay? Accuracy at equal tokens, equal source pixels and equal images seen.

    python benchmarks/accuracy.py [--task cluttered] [--contestants fixed adaptive object] [--budgets 16 49] [--seeds 0]

Each contestant is trained on the same images in the same order under the same schedule. Every run has a file of its
own in `benchmarks/results`, a run that was interrupted goes on from its last checkpoint, and a finished one is not
repeated: so the table grows over several sittings. `--report` writes the table and the curves of what is there and
trains nothing. `--speed` times all contestants of which there are results, in turn; leave the machine to it.
"""

import argparse
import itertools
import json
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from contestants import CONTESTANTS, VARIANTS, create_contestant, crop_side, square
from cost import multiply_adds
from curves import draw_curves
from environment import counted, machine, versions
from fashion import TASKS, load_task
from finding import finding
from photographs import SCENES, Photographed, load_scenes
from torch import nn

from timm_apvit import APViT
from timm_apvit.files import write_atomically
from timm_apvit.finetuning.checkpoints import CheckpointStore
from timm_apvit.finetuning.evaluation import autocast, images_per_second
from timm_apvit.finetuning.loop import Training
from timm_apvit.finetuning.processes import create_accelerator
from timm_apvit.finetuning.report import Row
from timm_apvit.finetuning.samples import Splits
from timm_apvit.finetuning.settings import Settings
from timm_apvit.finetuning.values import format_budget, number
from timm_apvit.learning.glance import fit_glance
from timm_apvit.models.glance import glances

RESULTS = Path(__file__).parent / 'results'
# How often a run is tested: after each twelfth of the images, or after each thousand of those of photographs.
EPOCHS, IMAGES_OF_SCENES = 12, 1_000
# What reads the glances is fitted first, to those of so many epochs of images, which then come again; and how often.
GLANCED, GLANCE_EPOCHS = 4, 10
# Settings that a result records.
RECORDED = (
    'epochs', 'batch_size', 'lr', 'weight_decay', 'layer_decay', 'warmup', 'seed', 'workers', 'device', 'num_patches',
    'mixup', 'cutmix', 'mixup_prob', 'smoothing', 'ema', 'localizer_lr_scale', 'backbone_lr_scale',
    'freeze_backbone_epochs', 'freeze_localizer_epochs', 'jitter', 'jitter_epochs', 'amp', 'grad_accum',
    'grad_checkpointing', 'compile',
)  # fmt: skip
AMP = {'none': None, 'bfloat16': 'bfloat16', 'float16': 'float16'}


def main() -> None:
    """Run what is asked for and has not been run, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--task', choices=[*TASKS, *SCENES], default='cluttered')
    add('--contestants', nargs='+', choices=CONTESTANTS, default=list(CONTESTANTS))
    add('--budgets', nargs='+', type=counted, default=[16])
    add('--seeds', nargs='+', type=number(int, 0), default=[0])
    add('--images', type=counted, help='images seen in a run (default: 120,000; of photographs 8,000)')
    add('--lr', type=float, help='peak learning rate (default: 1e-3; pretrained 3e-4)')
    add('--localizer-lr-scale', type=float, default=1.0)
    add('--model-kwargs', type=json.loads, default={}, metavar='JSON', help='further arguments of the adaptive model')
    add('--variant', choices=VARIANTS, help='train the adaptive model without one of its parts, or with another')
    add('--elastic', action='store_true', help='train one model for all the budgets, one at random in each update')
    add('--label', help="of what differs, in the name of its results (default: the variant, or 'elastic')")
    add('--fashion', type=Path, help="folder of Fashion-MNIST's IDX files")
    add('--weights', type=Path, help="DINOv2's ViT-S/14, for all tasks that start from weights")
    add('--threads', type=counted, default=1)
    add('--device', default='cpu')
    add('--amp', choices=AMP, help='(default: none; pretrained bfloat16)')
    add('--results', type=Path, default=RESULTS)
    add('--report', action='store_true', help='report only')
    add('--speed', action='store_true', help='measure the speed of what has been trained, and train nothing')
    options = parser.parse_args()
    from_weights = options.task == 'pretrained' or options.task in SCENES
    if not options.report and from_weights != (options.weights is not None):
        parser.error('expected --weights with the tasks that start from them, and with no other')
    options.images = options.images or (8_000 if options.task in SCENES else 120_000)
    if options.elastic and options.contestants != ['adaptive']:
        parser.error('expected --elastic with --contestants adaptive, as no other can change its number of patches')
    torch.set_num_threads(options.threads)
    options.results.mkdir(parents=True, exist_ok=True)
    if options.speed:
        measure_speed(options)
    elif not options.report:
        budgets = [tuple(options.budgets)] if options.elastic else [(budget,) for budget in options.budgets]
        for seed, together, contestant in itertools.product(options.seeds, budgets, options.contestants):
            run(options, contestant, together, seed)
    report(options.results, options.task)


def run(options: argparse.Namespace, contestant: str, budgets: tuple[int, ...], seed: int) -> None:
    """Train one contestant for one budget, or for several at once, unless its results are there."""
    label = options.label or options.variant or ('elastic' if len(budgets) > 1 else '')
    names = {n: '-'.join(filter(None, [options.task, contestant, str(n), str(seed), label])) for n in budgets}
    paths = {budget: options.results / f'{name}.json' for budget, name in names.items()}
    training = training_of(options, contestant, budgets, seed)
    settings = {
        'images': options.images,
        'schedule': {name: getattr(training, name) for name in RECORDED},
        'model_kwargs': options.model_kwargs if contestant == 'adaptive' else {},
        'variant': options.variant,
    }
    if is_done(paths.values(), settings):
        return
    torch.manual_seed(seed)
    largest = max(budgets)
    splits = load_splits(options, contestant, largest, seed)
    side, classes = splits.test[0][0].shape[-1], len(splits.label_names)
    kwargs = {**settings['model_kwargs'], 'num_classes': classes}
    model = create_contestant(contestant, side, largest, options.weights, options.variant, **kwargs)
    unfinished = options.results / f'.{names[largest]}.unfinished'
    unfinished.mkdir(exist_ok=True)
    store = CheckpointStore(unfinished)
    fit_seconds = fit(model, splits, training) if store.load() is None else None

    def tell(rows: list[Row]) -> None:
        row = rows[-1]
        sys.stdout.write(f'{names[largest]} {row["epoch"]}/{training.epochs} loss {row["train_loss"]:.3f} '
                         f'top-1 {row["test_top1"]:.4f} {row["seconds"]:.0f} s\n')  # fmt: skip
        sys.stdout.flush()

    accelerator = create_accelerator(training, unfinished)
    rows = Training(accelerator, model, splits, training, store, name=names[largest]).run(lambda *_: None, tell)
    for budget, path in paths.items():
        if isinstance(model, APViT):
            model.set_num_patches(square(budget))
        curve = [row[f'test_top1_{format_budget(square(budget))}' if len(budgets) > 1 else 'test_top1'] for row in rows]
        found: dict[str, Any] = {}
        if isinstance(splits.test, Photographed):
            found = finding(model, splits.test, training.amp, options.device)
        result = {
            'task': options.task, 'contestant': contestant, 'label': label, 'budget': budget, 'seed': seed,
            'top1': curve[-1], 'test_images': len(splits.test),
            'images_seen': [int(row['epoch']) * options.images // training.epochs for row in rows],
            'curve': curve, 'fit_seconds': fit_seconds, 'seconds': [row['seconds'] for row in rows],
            'multiply_adds': multiply_adds(model, splits.test[0][0][None].to(options.device)).total(),
            **settings,
            **found,
            'machine': machine(options.threads),
            'versions': versions(),
            'command': ' '.join(sys.argv), 'time': time.strftime('%Y-%m-%d'),
        }  # fmt: skip
        write_atomically(path, json.dumps(result, indent=1) + '\n')
    shutil.rmtree(unfinished)


def load_splits(options: argparse.Namespace, contestant: str, budget: int, seed: int) -> Splits:
    """The images of a contestant."""
    crop = crop_side(contestant, budget, options.weights is not None)
    if options.task in SCENES:
        return load_scenes(SCENES[options.task], seed + 1, IMAGES_OF_SCENES, crop)
    return load_task(TASKS[options.task], seed + 1, options.images // EPOCHS, options.fashion, crop)


def fit(model: nn.Module, splits: Splits, training: Settings) -> float | None:
    """Give a model that glances its head start, and tell how long it took; None: it needs none."""
    if training.layer_decay == 1 or not (isinstance(model, APViT) and glances(model)):  # from scratch
        return None
    start = time.monotonic()
    model.to(training.device)
    batches = (splits.train.training_batches(epoch, training.batch_size) for epoch in range(GLANCED))
    with autocast(torch.device(str(training.device)), training.amp):
        fit_glance(model, itertools.chain.from_iterable(batches), GLANCE_EPOCHS)
    return time.monotonic() - start


def is_done(paths: Collection[Path], settings: dict[str, Any]) -> bool:
    """Whether all results are there; ValueError if one was made with other settings."""
    found = [path for path in paths if path.exists()]
    for path in found:
        result = json.loads(path.read_text())
        before = {key: result.get(key) for key in settings}
        if before != json.loads(json.dumps(settings)):
            raise ValueError(f'expected the settings of {path}, {before}, got {settings}; give a --label of their own')
    return len(found) == len(paths)


def training_of(options: argparse.Namespace, contestant: str, budgets: tuple[int, ...], seed: int) -> Settings:
    """How a contestant is trained."""
    pretrained = options.weights is not None
    epochs = options.images // IMAGES_OF_SCENES if options.task in SCENES else EPOCHS
    return Settings(
        epochs=epochs,
        batch_size=32 if pretrained else 64,
        lr=options.lr or (3e-4 if pretrained else 1e-3),
        weight_decay=0.05,
        layer_decay=0.75 if pretrained else 1.0,
        warmup=epochs / 10,
        seed=seed,
        workers=0,
        device=options.device,
        num_patches=tuple(square(budget) for budget in budgets) if len(budgets) > 1 else None,
        localizer_lr_scale=options.localizer_lr_scale,
        freeze_localizer_epochs=epochs if contestant == 'frozen' else 0,
        amp=AMP[options.amp or ('bfloat16' if pretrained else 'none')],
    )


@torch.no_grad()
def measure_speed(options: argparse.Namespace) -> None:
    """Images per second alone and in batches of 64: the median of rounds in which all contestants take turns."""
    subjects: dict[str, tuple[nn.Module, torch.Tensor]] = {}
    channels = 3 if options.task in SCENES else TASKS[options.task].channels
    whole = (SCENES.get(options.task) or TASKS[options.task]).side
    for result in read_results(options.results, options.task):
        key = ' '.join(str(result[name]) for name in ('budget', 'contestant', 'label'))
        if key not in subjects:
            model = create_contestant(
                result['contestant'],
                whole,
                result['budget'],
                options.weights,
                result.get('variant'),
                **result['model_kwargs'],
            )
            side = crop_side(result['contestant'], result['budget'], options.weights is not None) or whole
            subjects[key] = (
                model.eval().to(options.device),
                torch.randn(64, channels, side, side).to(options.device),
            )
    speeds: dict[str, dict[str, list[float]]] = {key: {'1': [], '64': []} for key in subjects}
    with torch.no_grad():
        for _ in range(5):
            for key, (model, images) in subjects.items():
                for number, found in speeds[key].items():
                    batch = images[: int(number)]
                    found.append(images_per_second(lambda model=model, batch=batch: model(batch), len(batch), 0.5))
    medians = {key: {number: statistics.median(found) for number, found in own.items()} for key, own in speeds.items()}
    text = json.dumps({'machine': machine(options.threads), 'images_per_second': medians}, indent=1)
    write_atomically(options.results / f'speed-{options.task}.json', text + '\n')


def read_results(folder: Path, task: str) -> list[dict[str, Any]]:
    """The results of a task."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(f'{task}-*.json'))]
    return [result for result in found if result['task'] == task]


def report(folder: Path, task: str) -> None:
    """Write the table and the curves of a task's results."""
    found = read_results(folder, task)
    timed = folder / f'speed-{task}.json'
    speeds = json.loads(timed.read_text())['images_per_second'] if timed.exists() else {}
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in found:
        groups[result['budget'], result['contestant'], result['label']].append(result)
    order = list(CONTESTANTS)
    keys = sorted(groups, key=lambda key: (key[0], order.index(key[1]), key[2]))
    headings = ['patches', 'contestant', 'first test', 'top-1', 'seeds', 'windows that hold it', 'M multiply-adds',
                'images/s alone', 'in batches of 64']  # fmt: skip
    lines = [f'| {" | ".join(headings)} |', '|---' * len(headings) + '|']
    for key in keys:
        runs = groups[key]
        top1 = [result['top1'] for result in runs]
        spread = f' ± {statistics.stdev(top1):.3f}' if len(top1) > 1 else ''
        first = statistics.mean(result['curve'][0] for result in runs)
        held = [result['held'] for result in runs if 'held' in result]
        speed = speeds.get(f'{key[0]} {key[1]} {key[2]}', {})
        lines.append(
            f'| {key[0]} | {" ".join(filter(None, key[1:]))} | {first:.3f} '
            f'| {statistics.mean(top1):.3f}{spread} | {len(top1)} | {f"{statistics.mean(held):.3f}" if held else ""} '
            f'| {runs[0]["multiply_adds"] / 1e6:.1f} | {_shown(speed, "1")} | {_shown(speed, "64")} |'
        )
    text = '\n'.join(lines) + '\n'
    sys.stdout.write(text)
    write_atomically(folder / f'{task}.md', text)
    if found:
        draw_curves({key: groups[key] for key in keys}, folder / f'{task}.png', together=task in SCENES)


def _shown(speed: dict[str, float], batch: str) -> str:
    return f'{speed[batch]:.0f}' if speed else 'not measured'


if __name__ == '__main__':
    main()

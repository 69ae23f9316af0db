"""A run of fine-tuning, to be read from top to bottom: settings, data, model, training, report."""

import json
import re
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from timm_apvit.failures import FailedError, explain, require
from timm_apvit.files import write_atomically
from timm_apvit.finetuning.baseline import create_baseline, save_baseline
from timm_apvit.finetuning.checkpoints import (
    BEST,
    LAST,
    TWIN,
    CheckpointStore,
    create_run,
    discard,
    lock,
    write_metrics,
)
from timm_apvit.finetuning.config import config_text
from timm_apvit.finetuning.models import create_model, start_model, with_images
from timm_apvit.finetuning.preparation import check_batches, check_budgets, resolve_settings
from timm_apvit.finetuning.processes import create_accelerator, in_all_processes, workers_of
from timm_apvit.finetuning.report import FIXED, SUMMARY, Row, display_name, epoch_line, save_picture, summarise, table
from timm_apvit.finetuning.samples import BatchSplit, Splits
from timm_apvit.finetuning.settings import CONFIG_FILE, SELF, Settings
from timm_apvit.finetuning.signals import Interrupted
from timm_apvit.finetuning.sources import load_splits
from timm_apvit.finetuning.values import count, format_budget
from timm_apvit.hub.access import check_access
from timm_apvit.hub.card import PICTURE
from timm_apvit.hub.labels import MULTI_LABEL
from timm_apvit.hub.saving import save_pretrained
from timm_apvit.learning.adaptation import stood_still
from timm_apvit.learning.glance import glance_of
from timm_apvit.models.glance import glances
from timm_apvit.models.mixin import APViT, crowds
from timm_apvit.pictures.images import image_config

LESS_MEMORY = (
    'raise --grad-accum or add --grad-checkpointing, of a run that is resumed too (the same result in less memory), or '
    'begin another run with a lower --batch-size or --num-patches, or --amp bfloat16'
)


class Run(NamedTuple):
    """A run whose settings proved sound.

    Attributes:
        settings: all of them.
        directory: of its checkpoints.
        accelerator: accelerate's own.
        splits: training and test data.
        model: to train.
        baseline: the same ViT on a fixed grid, to train too; None: none.
        teacher: to learn from besides the labels, and the weights of its terms; None: none.
        notes: what people should know before it begins.
        locked: keeps other processes from the directory until it is left.
    """

    settings: Settings
    directory: Path
    accelerator: Any
    splits: Splits
    model: APViT
    baseline: nn.Module | None
    teacher: Any
    notes: tuple[str, ...]
    locked: Any = nullcontext()


def prepare_run(given: dict[str, Any]) -> Run:
    """Prepare a run from options by their names: check all that can be checked before any long work.

    The last thing it does is to make the folder of the run, or open it again.
    """
    for module in ('accelerate', 'tqdm', 'matplotlib'):
        require(module, 'fine-tuning')
    settings, directory = resolve_settings(given)
    accelerator = create_accelerator(settings, directory)
    resumes = settings.resume is not None
    locked = in_all_processes(lambda: lock(directory) if resumes and accelerator.is_main_process else nullcontext())
    run = in_all_processes(lambda: load_run(settings, directory, accelerator))._replace(locked=locked)
    return run if resumes else in_all_processes(lambda: run._replace(locked=make_folder(run)))


def load_run(settings: Settings, directory: Path, accelerator: Any) -> Run:
    """Load data and model; write nothing."""
    from timm_apvit.finetuning.loop import check_state, load_state, needs_glance_fit
    from timm_apvit.finetuning.objectives import check_labels
    from timm_apvit.finetuning.teachers import check_teacher, create_teacher

    if settings.push_to_hub is not None and accelerator.is_main_process:
        check_access(settings.push_to_hub)
    config_text(settings)  # raises TypeError before any long work
    check_teacher(settings)
    states = [load_state(CheckpointStore(each)) for each in (directory, directory / TWIN)]
    settings = replace(settings, workers=workers_of(settings))
    # What a run has saved it does not look for where it once came from.
    last = (directory / LAST).absolute()
    begun = last.is_dir() and not (settings.twin and states[1] is None) and settings.teacher != SELF
    own = replace(settings, model=f'local-dir:{last}', pretrained=False, checkpoint=None)
    source = own if begun else settings
    with torch.device('meta'):  # what images it takes is asked before the data are looked through
        data_config = image_config(with_images(create_model(source, num_classes=0), settings))
    check_budgets(settings.num_patches, data_config['input_size'][1] * data_config['input_size'][2])
    splits = load_splits(settings, data_config, max(1, settings.workers or 0))
    check_batches(settings, len(splits.train), BatchSplit(0, accelerator.num_processes, settings.grad_accum))
    check_labels(settings, splits)
    for state in states:
        if state is not None:
            check_state(state, splits, settings)
    torch.manual_seed(settings.seed)
    start = start_model(source, len(splits.label_names), weights=not begun)
    model = with_images(start.model, settings)
    for budget in sorted(settings.num_patches or (), key=count):  # that it can have them, the most at last
        model.set_num_patches(budget)
    teacher = create_teacher(settings, start, data_config)
    baseline = create_baseline(model) if settings.twin else None
    notes = () if states[0] is not None else start.notes
    if settings.images_of_update > len(splits.train):
        notes += (f'a batch is all of the {len(splits.train)} training images, fewer than --batch-size',)
    if crowds(model):
        notes += ('labels do not teach where patches crowd: masks do (timm_apvit.learning.saliency)',)
    if glances(model):
        fits = states[0] is None and needs_glance_fit(model, settings)
        notes += (glance_note(model, settings.glance_epochs if fits else 0),)
    return Run(settings, directory, accelerator, splits, model, baseline, teacher, notes)


def glance_note(model: APViT, epochs: int | None) -> str:
    """That the model glances, and whether it is fitted first."""
    first = f', fitted first for {epochs} epochs' if epochs else ''
    return (
        f'the patches close in on what a glance of the first {glance_of(model).blocks} blocks finds{first} '
        '(--localizer cnn: they move one by one)'
    )


def make_folder(run: Run) -> Any:
    """Make the folder of a run, in the main process, and keep other processes out of it."""
    if not run.accelerator.is_main_process:
        return nullcontext()
    create_run(run.directory, config_text(run.settings))
    return lock(run.directory)


def execute(run: Run) -> None:
    """Train the model and its baseline, and write the summary and the picture."""
    directory, accelerator = run.directory, run.accelerator
    resume = f'continue with --resume {directory}'
    try:
        with run.locked:
            train_all(run)
    except KeyboardInterrupt as error:
        raise Interrupted(getattr(error, 'number', signal.SIGINT), f'interrupted; {resume}') from error
    # RuntimeError: out of memory, a lost process, and what else torch finds only when it computes; ValueError: data
    # that are wrong where they were not read before; and whatever else a file or another library may raise.
    except Exception as error:
        text = explain(error, LESS_MEMORY, accelerator.num_processes > 1)
        if (directory / LAST).is_symlink() and accelerator.is_main_process:
            text += f'; the last checkpoint is kept in {directory / LAST}; {resume}'
        elif run.settings.resume is None and accelerator.is_main_process and discard(directory):
            text += '; nothing was written'
        raise FailedError(text) from error
    accelerator.end_training()


def train_all(run: Run) -> None:
    """Train, and report."""
    settings, splits, is_main = run.settings, run.splits, run.accelerator.is_main_process
    name = display_name(str(settings.model))
    budgets = sorted(settings.num_patches or (run.model.num_patches,), key=count)
    if is_main:
        if settings.resume is not None:
            write_atomically(run.directory / CONFIG_FILE, config_text(settings))  # with what may change
        patches = ', '.join(map(format_budget, budgets))
        data = f'{len(splits.train)} training images an epoch, {len(splits.test)} images of {splits.test_name}'
        say(f'{name}: {patches} patches, {data}, {len(splits.label_names)} classes -> {run.directory}', *run.notes)
    rows = {name: train(run, run.model, name, run.directory)}
    if run.baseline is not None:
        rows[FIXED] = train(run, run.baseline, FIXED, run.directory / TWIN)
    if not is_main:
        return
    summary = {name: summarise(rows[name], budgets, settings.monitor)}
    if run.baseline is not None:
        tokens = int(getattr(run.baseline, 'patch_embed').num_patches)  # noqa: B009
        summary[FIXED] = summarise(rows[FIXED], [tokens], settings.monitor)
    write_atomically(run.directory / SUMMARY, json.dumps(summary, indent=2) + '\n')
    say(table(summary))
    if stood_still(rows[name][-1]) and not crowds(run.model):  # of which labels tell nothing
        say('the patches have not moved from their grid: train longer, or raise --localizer-lr-scale')
    best = f'local-dir:{run.directory / BEST}'
    picture = run.directory / PICTURE
    save_picture(timm.create_model(best, pretrained=True), splits, picture)
    say(f'picture     {picture}', f"best model  timm.create_model('{best}', pretrained=True)")


def train(run: Run, model: nn.Module, name: str, directory: Path) -> list[Row]:
    """Train one model in a directory of its own, with a tracker of its own, and report each epoch."""
    from tqdm import tqdm

    from timm_apvit.finetuning.loop import Training

    settings, accelerator, names = run.settings, run.accelerator, list(run.splits.label_names)
    kind = MULTI_LABEL if run.splits.multi_label else None
    if accelerator.is_main_process:
        directory.mkdir(exist_ok=True)

    def export(model: nn.Module, directory: Path) -> None:
        if isinstance(model, APViT):
            save_pretrained(model, directory, label_names=names, model_config={'problem_type': kind})
        else:
            save_baseline(model, directory, names, run.splits.multi_label)

    def report(rows: list[Row]) -> None:
        write_metrics(directory, rows)
        tqdm.write(f'{name:<12}  {epoch_line(rows[-1], settings.epochs or 0)}')
        if len(rows) > before:  # what a run that is resumed had logged is not logged again
            accelerator.log(rows[-1], step=int(rows[-1]['epoch']))

    store = CheckpointStore(directory, settings.snapshots)
    training = Training(accelerator, model, run.splits, settings, store, run.teacher, name)
    before = len(training.rows)
    if settings.log_with is not None:
        tracked = {key: str(value) for key, value in vars(settings).items()}
        accelerator.init_trackers(re.sub(r'[^\w.-]+', '-', name), config=tracked)
    try:
        return training.run(export, report)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def say(*lines: str) -> None:
    """Print lines at once."""
    sys.stdout.write(''.join(f'{line}\n' for line in lines))
    sys.stdout.flush()

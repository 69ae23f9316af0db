"""A run of fine-tuning, to be read from top to bottom: settings, data, model, training, report."""

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from timm_apvit.failures import FailedError, RefusedError, explain, refusing
from timm_apvit.files import write_atomically
from timm_apvit.finetuning.baseline import create_baseline, save_baseline
from timm_apvit.finetuning.batches import Division, Splits
from timm_apvit.finetuning.config import config_text
from timm_apvit.finetuning.folder import BEST, LAST, CheckpointStore, create_run, locked, write_metrics
from timm_apvit.finetuning.models import create_model, start_model, with_images
from timm_apvit.finetuning.preparation import check_batches, check_budgets, check_destination, settle
from timm_apvit.finetuning.processes import create_accelerator, together, workers_of
from timm_apvit.finetuning.report import epoch_line, save_picture, summarise, table
from timm_apvit.finetuning.settings import CONFIG_FILE, Settings
from timm_apvit.finetuning.signals import Interrupted
from timm_apvit.finetuning.sources import load_splits
from timm_apvit.finetuning.values import count, format_budget
from timm_apvit.hub.saving import save_pretrained
from timm_apvit.learning.adaptation import stood_still
from timm_apvit.learning.glance import glance_of
from timm_apvit.models.glance import glances
from timm_apvit.models.mixin import APViT
from timm_apvit.pictures.images import image_config

FIXED = 'fixed grid'
TO_LOWER = (
    'lower --batch-size or --num-patches, raise --grad-accum (the same result in less memory), '
    'or add --amp bfloat16 or --grad-checkpointing'
)


class Run(NamedTuple):
    """A run whose settings proved sound.

    Attributes:
        settings: all of them.
        directory: of its checkpoints.
        splits: training and test data.
        data_config: of the images that the model takes.
        model: to train.
        baseline: the same ViT on a fixed grid, to train too; None: none.
        teacher: to learn from besides the labels, and the weights of its terms; None: none.
        notes: what people should know before it begins.
    """

    settings: Settings
    directory: Path
    splits: Splits
    data_config: dict[str, Any]
    model: APViT
    baseline: nn.Module | None
    teacher: Any
    notes: tuple[str, ...]


def finetune(given: dict[str, Any]) -> Path:
    """Fine-tune a model as options say, by their names, and return the folder of the run.

    Raises:
        RefusedError: bad input, found before any work.
        FailedError: the training failed or was interrupted; it says what is kept.
    """
    rank = int(os.environ.get('RANK', '0'))
    try:
        with refusing():
            for module in ('accelerate', 'tqdm', 'matplotlib'):
                if importlib.util.find_spec(module) is None:
                    raise ModuleNotFoundError(f"fine-tuning needs {module}: pip install 'timm-apvit[finetune]'")
            settings, directory = settle(given)
            accelerator = create_accelerator(settings, directory)
        run = together(lambda: prepare(settings, directory, accelerator))
        with ExitStack() as stack:
            together(lambda: stack.enter_context(opened(run, accelerator.is_main_process)))
            execute(run, accelerator)
        accelerator.end_training()
    except RefusedError as error:  # in all processes alike
        raise error if rank == 0 else FailedError('', 2) from error
    except KeyboardInterrupt as error:
        status = 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)
        goes_on = f'; continue with --resume {directory}' if (directory / CONFIG_FILE).is_file() else ''
        raise FailedError(f'interrupted{goes_on}' * (rank == 0), status) from error
    except (FloatingPointError, OSError, RuntimeError, MemoryError, ValueError) as error:
        # RuntimeError: out of memory, a lost process, and what else torch finds only when it computes.
        # ValueError: data that are wrong where they were not read before.
        who = f'process {rank}: ' if rank else ''
        text = who + explain(error, TO_LOWER, accelerator.num_processes > 1) + kept(directory)
        raise FailedError('' if rank and isinstance(error, FloatingPointError) else text) from error
    return directory


def prepare(settings: Settings, directory: Path, accelerator: Any) -> Run:
    """Load data and model and check everything that can be checked before any long work; write nothing.

    Raises:
        ValueError, OSError, ModuleNotFoundError: bad input, or an extra is missing.
    """
    from timm_apvit.finetuning.loop import check_state, fits_first
    from timm_apvit.finetuning.objectives import check_labels
    from timm_apvit.finetuning.teachers import create_teacher

    if accelerator.is_main_process:
        check_destination(settings)
    config_text(settings)  # raises TypeError before any long work
    settings = replace(settings, workers=workers_of(settings))
    with torch.device('meta'):  # what images it takes is asked before the data are looked through
        data_config = image_config(with_images(create_model(settings, num_classes=0), settings))
    check_budgets(settings, data_config['input_size'][1] * data_config['input_size'][2])
    splits = load_splits(settings, data_config, max(1, settings.workers or 0))
    check_batches(settings, len(splits.train), Division(0, accelerator.num_processes, settings.grad_accum))
    check_labels(settings, splits)
    resumes = [check_state(CheckpointStore(each), splits) for each in (directory, directory / 'twin')]
    torch.manual_seed(settings.seed)
    start = start_model(settings, len(splits.label_names))
    model = with_images(start.model, settings)
    teacher = create_teacher(settings, start, data_config)
    baseline = create_baseline(model) if settings.twin else None
    notes = () if any(resumes) else start.notes
    if glances(model):
        fits = not any(resumes) and fits_first(model, settings)
        first = f', fitted first for {settings.glance_epochs} epochs' if fits else ''
        notes += (f'the patches close in on what a glance of the first {glance_of(model).blocks} blocks finds{first} '
                  '(--localizer cnn: they move one by one)',)  # fmt: skip
    return Run(settings, directory, splits, data_config, model, baseline, teacher, notes)


@contextmanager
def opened(run: Run, is_main: bool) -> Iterator[None]:
    """Make the folder of a run, or open it again, and keep other processes out of it.

    Raises:
        OSError: it exists, cannot be made, or another process trains in it.
    """
    if not is_main:
        yield
        return
    if run.settings.resume is None:
        create_run(run.directory, config_text(run.settings))
    with locked(run.directory):
        if run.settings.resume is not None:
            write_atomically(run.directory / CONFIG_FILE, config_text(run.settings))  # with what may change
        yield


def execute(run: Run, accelerator: Any) -> None:
    """Train the model and its baseline, and write the summary and the picture."""
    settings, splits, is_main = run.settings, run.splits, accelerator.is_main_process
    name = str(settings.model)
    budgets = sorted(settings.num_patches or (run.model.num_patches,), key=count)
    if is_main:
        patches = ', '.join(map(format_budget, budgets))
        data = f'{len(splits.train)} training images an epoch, {len(splits.test)} test images'
        echo(f'{name}: {patches} patches, {data}, {len(splits.label_names)} classes -> {run.directory}')
        for note in run.notes:
            echo(note)
    if settings.log_with is not None:
        accelerator.init_trackers(name, config={k: str(v) for k, v in vars(settings).items()})
    rows = {name: train(run, accelerator, run.model, name, run.directory)}
    if run.baseline is not None:
        rows[FIXED] = train(run, accelerator, run.baseline, FIXED, run.directory / 'twin')
    if not is_main:
        return
    summary = {name: summarise(rows[name], [(count(each), format_budget(each)) for each in budgets], settings.monitor)}
    if run.baseline is not None:
        tokens = int(getattr(run.baseline, 'patch_embed').num_patches)  # noqa: B009
        summary[FIXED] = summarise(rows[FIXED], [(tokens, str(tokens))], settings.monitor)
    write_atomically(run.directory / 'summary.json', json.dumps(summary, indent=2) + '\n')
    echo(table(summary))
    if stood_still(rows[name][-1]):
        echo('the patches have not moved from their grid: train longer, or raise --localizer-lr-scale')
    best = f'local-dir:{run.directory / BEST}'
    picture = run.directory / 'patches.png'
    save_picture(timm.create_model(best, pretrained=True), splits, run.data_config, picture)
    echo(f"picture     {picture}\nbest model  timm.create_model('{best}', pretrained=True)")


def train(run: Run, accelerator: Any, model: nn.Module, name: str, directory: Path) -> list[dict[str, float]]:
    """Train one model in a directory of its own, telling of each epoch."""
    from timm_apvit.finetuning.loop import Training

    settings, names = run.settings, list(run.splits.label_names)
    if accelerator.is_main_process:
        directory.mkdir(exist_ok=True)

    def export(model: nn.Module, directory: Path) -> None:
        if isinstance(model, APViT):
            save_pretrained(model, directory, label_names=names)
        else:
            save_baseline(model, directory, names)

    def tell(rows: list[dict[str, float]]) -> None:
        write_metrics(directory, rows)
        echo(f'{name:<12}  {epoch_line(rows[-1], settings.epochs or 0)}')
        if len(rows) > before:  # what a run that is resumed had logged is not logged again
            step = int(rows[-1]['epoch'])
            accelerator.log({f'{name}/{key}': value for key, value in rows[-1].items() if key != 'epoch'}, step=step)

    store = CheckpointStore(directory, settings.snapshots)
    training = Training(accelerator, model, run.splits, settings, store, run.teacher, name)
    before = len(training.rows)
    return training.run(export, tell)


def kept(directory: Path) -> str:
    """What is left of a run that failed."""
    if not (directory / LAST).is_symlink():
        return ''
    return f'; the last checkpoint is kept in {directory / LAST}; continue with --resume {directory}'


def echo(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + '\n')
    sys.stdout.flush()

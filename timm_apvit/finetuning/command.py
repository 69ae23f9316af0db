"""The fine-tuning command: options -> a trained model, its twin's accuracy, checkpoints, metrics and a picture."""

import importlib.util
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from timm_apvit.finetuning import options as defaults
from timm_apvit.finetuning.checkpoints import (
    BEST,
    CheckpointStore,
    check_vacant,
    create_run,
    first_line,
    read_options,
    write_atomically,
)
from timm_apvit.finetuning.data import Splits, load_folder
from timm_apvit.finetuning.digits import load_embedded_digits
from timm_apvit.finetuning.options import Options, from_json, to_json
from timm_apvit.finetuning.report import save_picture, table
from timm_apvit.finetuning.training import STATE_KEYS, Row, Schedule, best_row, train
from timm_apvit.finetuning.twin import create_twin
from timm_apvit.hub import save_pretrained
from timm_apvit.vision_transformer import APViT


class Run(NamedTuple):
    """A run whose options proved sound."""

    options: Options
    directory: Path
    model: APViT
    twin: nn.Module | None
    splits: Splits
    data_config: dict[str, Any]
    schedule: Schedule


def finetune(given: dict[str, Any]) -> int:
    """Run the command with the options given; return the exit status."""
    try:
        run = prepare(_with_absolute_paths(given))
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        _echo('interrupted before the training began')
        return 130
    try:
        execute(run)
    # RuntimeError: out of memory, and what else torch finds only when it computes.
    except (FloatingPointError, OSError, RuntimeError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        _echo(f'interrupted; continue with --resume {run.directory}')
        return 130
    return 0


def prepare(given: dict[str, Any]) -> Run:
    """Check everything that can be checked before any long work, and make or open the run's directory.

    Raises:
        ValueError, OSError, ModuleNotFoundError: bad input, or an extra is missing.
    """
    for module in ('tqdm', 'matplotlib'):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"fine-tuning needs {module}: pip install 'timm-apvit[finetune]'")
    resumed = given.get('resume') is not None
    if resumed:
        if given.get('output') is not None:
            raise ValueError('expected --output or --resume, got both')
        directory = Path(given['resume'])
        options = from_json(read_options(directory), given)
        states = [CheckpointStore(each).load() for each in (directory, directory / 'twin')]
    else:
        options = with_defaults(Options(**given))
        default = Path('runs', f'{_file_name(options.model)}-{time.strftime("%Y%m%d-%H%M%S")}')
        directory = Path(options.output or default)
        check_vacant(directory)
        states = []
    schedule = _schedule(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    json.dumps(to_json(options))  # raises TypeError before any long work
    splits, model, data_config = _load(options, schedule)
    _check_states(states, splits)
    twin = create_twin(model, **options.model_kwargs) if options.twin else None
    if not resumed:
        create_run(directory, to_json(options))
    return Run(options, directory, model, twin, splits, data_config, schedule)


def _with_absolute_paths(given: dict[str, Any]) -> dict[str, Any]:
    """Options whose paths hold in any folder, so that --resume does."""
    absolute = {
        name: str(Path(given[name]).resolve()) for name in ('data', 'checkpoint') if given.get(name) is not None
    }
    source, colon, path = str(given.get('model')).partition(':')
    if source == 'local-dir' and colon:
        absolute['model'] = f'local-dir:{Path(path).resolve()}'
    return {**given, **absolute}


def _check_states(states: list[dict[str, Any] | None], splits: Splits) -> None:
    """Raise ValueError unless saved states are those of a training on the classes that the data have now."""
    for state in states:
        if state is not None and not (isinstance(state, dict) and state.keys() >= STATE_KEYS):
            raise ValueError(f'expected a saved state with {", ".join(sorted(STATE_KEYS))}, got another file')
        if state is not None and tuple(state['label_names']) != splits.label_names:
            raise ValueError(
                f'expected the classes that the run was trained on, {", ".join(state["label_names"])}, '
                f'got {", ".join(splits.label_names)}'
            )


def with_defaults(options: Options) -> Options:
    """Fill in the defaults that depend on other options."""
    embedded = options.data is None
    changes: dict[str, Any] = {}
    if options.model is None:
        changes['model'] = defaults.EMBEDDED_MODEL if embedded else 'apvit_small'
        if embedded:
            changes['model_kwargs'] = {**defaults.EMBEDDED_MODEL_KWARGS, **options.model_kwargs}
            usual = {
                'img_size': defaults.EMBEDDED_IMG_SIZE,
                'num_patches': defaults.EMBEDDED_NUM_PATCHES,
                'transform': defaults.EMBEDDED_TRANSFORM,
            }
            changes.update({name: value for name, value in usual.items() if name not in options.model_kwargs})
            changes.update({name: getattr(options, name) for name in usual if getattr(options, name) is not None})
    fine_tuned = options.pretrained or options.checkpoint is not None
    epochs = options.epochs or (6 if embedded else 10)
    scratch_lr = 2e-3 if embedded else 1e-3
    filled = {
        'twin': embedded,
        'epochs': epochs,
        'lr': 2e-4 if fine_tuned else scratch_lr,
        'layer_decay': 0.75 if fine_tuned else 1.0,
        'warmup': epochs / 10,
    }
    changes.update({name: value for name, value in filled.items() if getattr(options, name) is None})
    return replace(options, **changes)


def _schedule(options: Options) -> Schedule:
    device = options.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'expected a device that is there, got {device!r}: {first_line(error)}') from None
    workers = options.workers
    if workers is None:
        workers = 0 if options.data is None else min(8, os.cpu_count() or 1)
    same = {name: getattr(options, name) for name in Schedule._fields if name not in ('device', 'workers')}
    if same['warmup'] >= same['epochs']:
        raise ValueError(f'expected --warmup below --epochs, got {same["warmup"]:g} of {same["epochs"]}')
    return Schedule(**same, device=device, workers=workers)


def _load(options: Options, schedule: Schedule) -> tuple[Splits, APViT, dict[str, Any]]:
    """Load the data, and a model that has a class for each of theirs."""
    # A model without a classifier is quickly made and tells what images it takes, before the data are looked through.
    probe = _create_model(options, num_classes=0, weights=False)
    data_config = _data_config(probe)
    input_size, mean, std = (data_config[key] for key in ('input_size', 'mean', 'std'))
    if options.data is None:
        splits = load_embedded_digits(options.seed, input_size, options.samples, options.test_samples, mean, std)
    else:
        splits = load_folder(Path(options.data), options.seed, data_config, workers=max(1, schedule.workers))
    torch.manual_seed(options.seed)
    model = _create_model(options, num_classes=len(splits.label_names), weights=True)
    return splits, model, data_config


def _create_model(options: Options, num_classes: int, weights: bool) -> APViT:
    """Create the model of the options.

    Raises:
        ValueError: it cannot be created, is not an APViT, or its weights cannot be loaded.
    """
    name = str(options.model)
    optional = {'num_patches': options.num_patches, 'transform': options.transform, 'img_size': options.img_size}
    kwargs = {**options.model_kwargs, **{key: value for key, value in optional.items() if value is not None}}
    if ':' not in name and not timm.is_model(name.partition('.')[0]):
        models = ', '.join(sorted(timm.list_models('apvit_*')))
        raise ValueError(f'expected a registered model, such as {models}, got {name!r}')
    pretrained = weights and options.pretrained
    if options.checkpoint is not None:
        if not Path(options.checkpoint).is_file():
            raise FileNotFoundError(f'expected a checkpoint file, got {options.checkpoint!r}, which is not a file')
        overlay = {'file': options.checkpoint, 'custom_load': options.checkpoint.endswith('.npz')}
        pretrained = weights
        kwargs['pretrained_cfg_overlay'] = overlay
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    # Weights that are damaged, of another model or out of reach fail in as many ways as there are formats.
    except Exception as error:
        source = f' with the weights in {options.checkpoint}' if weights and options.checkpoint else ''
        raise ValueError(f'cannot create {name}{source}: {first_line(error)}') from error
    if not isinstance(model, APViT):
        raise ValueError(f'expected an APViT, got {name!r}, which is a {type(model).__name__}')
    return model


def _data_config(model: APViT) -> dict[str, Any]:
    """Size and normalisation of the images that a model takes."""
    in_chans = model.patch_embed.patching.in_chans
    config: dict[str, Any] = resolve_data_config({'input_size': (in_chans, *model.patch_embed.img_size)}, model=model)
    for key in ('mean', 'std'):
        if len(config[key]) != in_chans:
            config[key] = (sum(config[key]) / len(config[key]),) * in_chans
    return config


def execute(run: Run) -> None:
    """Train the model and its twin, and write the summary and the picture."""
    names = [str(run.options.model), 'fixed grid']
    _echo(f'{names[0]}: {run.model.num_patches} patches, {len(run.splits.train)} training images an epoch, '
          f'{len(run.splits.test)} test images, {len(run.splits.label_names)} classes -> {run.directory}')  # fmt: skip

    def export(directory: Path) -> None:
        save_pretrained(run.model, directory, label_names=list(run.splits.label_names))

    rows = {names[0]: _train(run, run.model, names[0], run.directory, export)}
    if run.twin is not None:
        twin_directory = run.directory / 'twin'
        twin_directory.mkdir(exist_ok=True)
        rows[names[1]] = _train(run, run.twin, names[1], twin_directory, lambda _: None)
    tokens = {names[0]: run.model.num_patches}
    if run.twin is not None:
        tokens[names[1]] = int(getattr(run.twin, 'patch_embed').num_patches)  # noqa: B009
    summary = {
        name: {
            'num_patches': tokens[name],
            'top1': own[-1]['test_top1'],
            'best_top1': best_row(own)['test_top1'],
            'best_epoch': best_row(own)['epoch'],
            'seconds': round(sum(row['seconds'] for row in own), 1),
        }
        for name, own in rows.items()
    }
    write_atomically(run.directory / 'summary.json', json.dumps(summary, indent=2) + '\n')
    _echo(table(summary))
    picture = run.directory / 'patches.png'
    best = f'local-dir:{run.directory / BEST}'
    save_picture(timm.create_model(best, pretrained=True), run.splits, run.data_config, picture)
    _echo(f"picture     {picture}\nbest model  timm.create_model('{best}', pretrained=True)")


def _train(run: Run, model: nn.Module, name: str, directory: Path, export: Any) -> list[Row]:
    """Train one model in a directory of its own, telling of each epoch."""

    def on_epoch(rows: list[Row]) -> None:
        write_atomically(directory / 'metrics.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
        row = rows[-1]
        _echo(f'{name:<12}  epoch {row["epoch"]:>3}/{run.schedule.epochs}  train loss {row["train_loss"]:.3f}  '
              f'test loss {row["test_loss"]:.3f}  top-1 {row["test_top1"]:.3f}  {row["seconds"]:.1f} s')  # fmt: skip

    return train(model, run.splits, run.schedule, CheckpointStore(directory), export, on_epoch, name)


def _file_name(name: str | None) -> str:
    return ''.join(c if c.isalnum() or c in '._-' else '-' for c in str(name))


def _fail(error: Exception, status: int) -> int:
    sys.stderr.write(f'error: {error}\n')
    return status


def _echo(text: str) -> None:
    sys.stdout.write(text + '\n')
    sys.stdout.flush()

"""The fine-tuning command: options -> a trained model, its twin's accuracy, checkpoints, metrics and a picture."""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

import timm
from torch import nn

from timm_apvit.failures import explain
from timm_apvit.files import write_atomically
from timm_apvit.finetuning.checkpoints import BEST, LAST, CheckpointStore
from timm_apvit.finetuning.config import with_config
from timm_apvit.finetuning.distributed import DEFAULT_TIMEOUT, gather_from_processes, is_main, joined, rank, world_size
from timm_apvit.finetuning.logs import MetricsLog
from timm_apvit.finetuning.parsing import count, format_budget
from timm_apvit.finetuning.preparation import Run, opened, prepare
from timm_apvit.finetuning.push import again, push_directory, tell
from timm_apvit.finetuning.report import epoch_line, save_picture, summarise, table
from timm_apvit.finetuning.training import Row, train
from timm_apvit.hub.saving import save_pretrained
from timm_apvit.models.mixin import APViT

T = TypeVar('T')
TO_LOWER = (
    'lower --batch-size or --num-patches, raise --grad-accum (the same result in less memory), '
    'or add --amp bfloat16 or --grad-checkpointing'
)


class RefusedError(Exception):
    """Bad input, which some process found and all know of."""


def finetune(given: dict[str, Any]) -> int:
    """Run the command with the options given; return the exit status."""
    runs: list[Run] = []
    try:
        given = with_config(given)
    except (ValueError, OSError) as error:
        return _fail(str(error), 2) if is_main() else 2
    try:
        with joined(given.get('device'), given.get('timeout', DEFAULT_TIMEOUT)), ExitStack() as stack:
            runs.append(_together(lambda: prepare(given)))
            _together(lambda: stack.enter_context(opened(runs[0])))
            execute(runs[0])
        return _push(runs[0]) if is_main() and runs[0].options.push_to_hub is not None else 0
    except RefusedError as error:
        return _fail(str(error), 2) if is_main() else 2
    # RuntimeError: out of memory, a lost process, and what else torch finds only when it computes.
    # ValueError: data that are wrong where they were not read before.
    except (FloatingPointError, OSError, RuntimeError, MemoryError, ValueError) as error:
        agreed = isinstance(error, FloatingPointError)
        who = f'process {rank()}: ' if rank() > 0 else ''
        if is_main() or not agreed:
            _fail(who + explain(error, TO_LOWER, world_size() > 1) + _kept(runs), 1)
        return 1
    except KeyboardInterrupt:
        if is_main():
            _echo(f'interrupted; continue with --resume {runs[0].directory}' if runs else 'interrupted before it began')
        return 130


def _together(act: Callable[[], T]) -> T:
    """Do something in every process, and fail in all if it fails in one.

    Raises:
        RefusedError: it failed.
    """
    result, problem = None, None
    try:
        result = act()
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        problem = str(error)
    for number, found in enumerate(gather_from_processes(problem)):
        if found is not None:
            raise RefusedError(found if number == 0 else f'process {number}: {found}')
    return result  # type: ignore[return-value]


def execute(run: Run) -> None:
    """Train the model and its twin, and write the summary and the picture."""
    names = [str(run.options.model), 'fixed grid']
    budgets = sorted(run.schedule.num_patches or (run.model.num_patches,), key=count)
    patches = ', '.join(map(format_budget, budgets))
    _echo(f'{names[0]}: {patches} patches, {len(run.splits.train)} training images an epoch, '
          f'{len(run.splits.test)} test images, {len(run.splits.label_names)} classes -> {run.directory}')  # fmt: skip
    for note in run.notes:
        _echo(note)

    def export(model: nn.Module, directory: Path) -> None:
        if isinstance(model, APViT):
            save_pretrained(model, directory, label_names=list(run.splits.label_names))

    rows = {names[0]: _train(run, run.model, names[0], run.directory, export)}
    if run.twin is not None:
        rows[names[1]] = _train(run, run.twin, names[1], run.directory / 'twin', export)
    if not is_main():
        return
    summary = {names[0]: summarise(rows[names[0]], [(count(each), format_budget(each)) for each in budgets])}
    if run.twin is not None:
        tokens = int(getattr(run.twin, 'patch_embed').num_patches)  # noqa: B009
        summary[names[1]] = summarise(rows[names[1]], [(tokens, str(tokens))])
    write_atomically(run.directory / 'summary.json', json.dumps(summary, indent=2) + '\n')
    _echo(table(summary))
    picture = run.directory / 'patches.png'
    best = f'local-dir:{run.directory / BEST}'
    save_picture(timm.create_model(best, pretrained=True), run.splits, run.data_config, picture)
    _echo(f"picture     {picture}\nbest model  timm.create_model('{best}', pretrained=True)")


def _push(run: Run) -> int:
    """Push the best model of a finished run; return the exit status."""
    given: dict[str, Any] = {'directory': run.directory, 'repo_id': str(run.options.push_to_hub)}
    given.update({'private': True} if run.options.private else {})
    given.update({} if run.options.push_picture else {'picture': False})
    kept = f'\nthe run is whole in {run.directory}; push it again with\n    {again(given)}'
    try:
        tell(push_directory(given))
    except (ValueError, OSError) as error:
        return _fail(f'{error}{kept}', 1)
    except KeyboardInterrupt:
        return _fail(f'interrupted while pushing{kept}', 130)
    return 0


def _train(
    run: Run, model: nn.Module, name: str, directory: Path, export: Callable[[nn.Module, Path], None]
) -> list[Row]:
    """Train one model in a directory of its own, telling of each epoch."""
    if is_main():
        directory.mkdir(exist_ok=True)

    def on_epoch(rows: list[Row]) -> None:
        log.write(rows)
        _echo(f'{name:<12}  {epoch_line(rows[-1], run.schedule.epochs)}')

    store = CheckpointStore(directory, run.options.snapshots)
    with closing(MetricsLog(directory, run.options.tensorboard)) as log:
        return train(model, run.splits, run.schedule, store, export, on_epoch, name, run.distillation)


def _kept(runs: list[Run]) -> str:
    """What is left of a run that failed."""
    if not runs or not (runs[0].directory / LAST).is_symlink():
        return ''
    return f'\nthe last checkpoint is kept in {runs[0].directory / LAST}; continue with --resume {runs[0].directory}'


def _fail(text: str, status: int) -> int:
    sys.stderr.write(f'error: {text}\n')
    return status


def _echo(text: str) -> None:
    """Print on the main process."""
    if is_main():
        sys.stdout.write(text + '\n')
        sys.stdout.flush()

"""The fine-tuning command."""

import argparse
from collections.abc import Callable
from typing import Any

from timm_apvit.cli.options import add_settings
from timm_apvit.cli.push import prepared_push, push_command, tell
from timm_apvit.failures import FailedError, one_line
from timm_apvit.finetuning.run import Run, execute, prepare_run
from timm_apvit.finetuning.signals import Interrupted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    add_settings(parser)


def prepare(given: dict[str, Any]) -> Callable[[], None]:
    """Prepare a run: fine-tune a model, and push it if that is asked for."""
    run = prepare_run(given)

    def work() -> None:
        execute(run)
        if run.settings.push_to_hub is not None and run.accelerator.is_main_process:
            push(run)

    return work


def push(run: Run) -> None:
    """Push the best model of a run that is done."""
    options: dict[str, Any] = {'directory': run.directory, 'repo_id': run.settings.push_to_hub}
    options.update({'private': True} if run.settings.private else {})
    options.update({} if run.settings.push_picture else {'picture': False})
    kept = f'\nthe run is whole in {run.directory}; push it again with\n    {push_command(options)}'
    try:
        tell(prepared_push(options)())
    except Exception as error:
        raise FailedError(one_line(error) + kept) from error
    except KeyboardInterrupt as error:
        raise Interrupted(text=f'interrupted while pushing{kept}') from error

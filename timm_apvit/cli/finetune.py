"""The fine-tuning command."""

import argparse
import os
from typing import Any

from timm_apvit.cli.push import again, push_directory, tell
from timm_apvit.failures import FailedError, one_line
from timm_apvit.finetuning.run import finetune
from timm_apvit.finetuning.settings import add_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser, which then returns only those that are given."""
    add_settings(parser)


def run(given: dict[str, Any]) -> None:
    """Fine-tune a model, and push it if that is asked for."""
    directory = finetune(given)
    if given.get('push_to_hub') is None or int(os.environ.get('RANK', '0')):  # the main process pushes
        return
    pushed: dict[str, Any] = {'directory': directory, 'repo_id': given['push_to_hub']}
    pushed.update({'private': True} if given.get('private') else {})
    pushed.update({} if given.get('push_picture', True) else {'picture': False})
    kept = f'\nthe run is whole in {directory}; push it again with\n    {again(pushed)}'
    try:
        tell(push_directory(pushed))
    except (ValueError, OSError) as error:
        raise FailedError(one_line(error) + kept) from error
    except KeyboardInterrupt as error:
        raise FailedError(f'interrupted while pushing{kept}', 130) from error

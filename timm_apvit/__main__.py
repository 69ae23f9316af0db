"""The command line: ``python -m timm_apvit COMMAND``."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from timm_apvit import __version__
from timm_apvit.finetuning.command import finetune
from timm_apvit.finetuning.evaluate import add_evaluate_arguments, evaluate_command
from timm_apvit.finetuning.options import add_arguments
from timm_apvit.show import add_show_arguments, show_command


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message} (see {self.prog} --help)\n')


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = _Parser(prog='python -m timm_apvit', description='Vision Transformers with adaptive patches.')
    parser.add_argument('--version', action='version', version=f'timm-apvit {__version__}')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    help_text = 'fine-tune a model on a folder of images, or on embedded digits'
    command = commands.add_parser('finetune', help=help_text, description=help_text[0].upper() + help_text[1:] + '.')
    add_arguments(command)
    command.set_defaults(run=finetune)
    help_text = 'measure accuracy, cost and speed of a model at several numbers of patches'
    command = commands.add_parser('evaluate', help=help_text, description=help_text[0].upper() + help_text[1:] + '.')
    add_evaluate_arguments(command)
    command.set_defaults(run=evaluate_command)
    help_text = 'draw where a model looks in images, and what its patches hold'
    command = commands.add_parser('show', help=help_text, description=help_text[0].upper() + help_text[1:] + '.')
    add_show_arguments(command)
    command.set_defaults(run=show_command)
    given = vars(parser.parse_args(arguments))
    run = given.pop('run')
    return int(run(given))


if __name__ == '__main__':
    sys.exit(main())

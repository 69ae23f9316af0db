"""The command line: ``python -m timm_apvit COMMAND``."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from timm_apvit import __version__
from timm_apvit.finetuning.command import finetune
from timm_apvit.finetuning.evaluate import add_evaluate_arguments, evaluate_command
from timm_apvit.finetuning.options import add_arguments
from timm_apvit.finetuning.push import add_push_arguments, push_command
from timm_apvit.show import add_show_arguments, show_command


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message} (see {self.prog} --help)\n')


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    offered = (
        ('finetune', 'fine-tune a model on a folder of images, or on embedded digits', add_arguments, finetune),
        (
            'evaluate',
            'measure accuracy, cost and speed of a model at several numbers of patches',
            add_evaluate_arguments,
            evaluate_command,
        ),
        ('show', 'draw where a model looks in images, and what its patches hold', add_show_arguments, show_command),
        (
            'push',
            'push a run, or a saved model, to the Hugging Face Hub, with a model card',
            add_push_arguments,
            push_command,
        ),
    )
    parser = _Parser(prog='python -m timm_apvit', description='Vision Transformers with adaptive patches.')
    parser.add_argument('--version', action='version', version=f'timm-apvit {__version__}')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    for name, help_text, add, run in offered:
        command = commands.add_parser(name, help=help_text, description=f'{help_text[0].upper()}{help_text[1:]}.')
        add(command)
        command.set_defaults(run=run)
    given = vars(parser.parse_args(arguments))
    run = given.pop('run')
    return int(run(given))


if __name__ == '__main__':
    sys.exit(main())

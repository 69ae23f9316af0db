"""The command line: ``timm-apvit COMMAND``, or ``python -m timm_apvit COMMAND``."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from timm_apvit import __version__
from timm_apvit.completion import add_completion_argument
from timm_apvit.finetuning.command import finetune
from timm_apvit.finetuning.evaluate import add_evaluate_arguments, evaluate_command
from timm_apvit.finetuning.export import add_export_arguments, export_command
from timm_apvit.finetuning.options import add_arguments
from timm_apvit.finetuning.push import add_push_arguments, push_command
from timm_apvit.finetuning.show import add_show_arguments, show_command
from timm_apvit.script import add_run_arguments, run_command

PROGRAM = 'timm-apvit'
COMMANDS = (
    ('finetune', 'fine-tune a model on images, or on embedded digits', add_arguments, finetune),
    ('evaluate', 'measure accuracy and speed by number of patches', add_evaluate_arguments, evaluate_command),
    ('show', 'draw where a model looks in images', add_show_arguments, show_command),
    ('export', 'export a model to ONNX or torch.export, and check it', add_export_arguments, export_command),
    ('push', 'push a model to the Hugging Face Hub, with a card', add_push_arguments, push_command),
    ('run', "run a script, such as timm's train.py, with our models", add_run_arguments, run_command),
)
EXAMPLE = """\
train a small model for five minutes, measure it with fewer patches and more, and look where it looks:
  {prog} finetune --output runs/first
  {prog} evaluate runs/first --num-patches 9,16,25
  {prog} show photo.jpg --checkpoint runs/first -o patches.png

{prog} COMMAND --help tells more of a command.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message} (see {self.prog} --help)\n')


class _Import(argparse.Action):
    """Import a module, from the current folder too, as soon as it is named."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, module: Any, option: Any = None) -> None:
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))  # as python -m does and an installed script does not
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever its code raises
            parser.error(f'cannot import {module!r}: {type(error).__name__}: {error}')


def make_parser(prog: str) -> argparse.ArgumentParser:
    """Parser of the command line of a program of this name."""
    parser = _Parser(
        prog=prog,
        description='Vision Transformers with adaptive patches.',
        epilog=EXAMPLE.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'timm-apvit {__version__}')
    add_completion_argument(parser, lambda: make_parser(PROGRAM))
    commands = parser.add_subparsers(required=True, metavar='COMMAND', title='commands')
    for name, help_text, add, run in COMMANDS:
        command = commands.add_parser(name, help=help_text, description=f'{help_text[0].upper()}{help_text[1:]}.')
        add(command)
        command.add_argument(
            '--import',
            action=_Import,
            default=argparse.SUPPRESS,
            metavar='MODULE',
            help='Python module to import first, such as one with a transform family of your own',
        )
        command.set_defaults(run=run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    installed = Path(sys.argv[0]).stem == PROGRAM
    given = vars(make_parser(PROGRAM if installed else 'python -m timm_apvit').parse_args(arguments))
    run = given.pop('run')
    return int(run(given))


if __name__ == '__main__':
    sys.exit(main())

"""The command line: ``timm-apvit COMMAND``, or ``python -m timm_apvit COMMAND``. Errors become a line here."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from timm_apvit import __version__
from timm_apvit.cli import evaluate, export, finetune, predict, push, run, show
from timm_apvit.cli.completion import add_completion_argument
from timm_apvit.failures import FailedError, RefusedError, explain

PROGRAM = 'timm-apvit'
NOTHING = 'interrupted; nothing was written'
PUSHED = 'interrupted; the repository has the files of before, or all of the new ones'


class Command(NamedTuple):
    """A command: its name and help, what adds its arguments to a parser, what runs it, and what Ctrl-C leaves."""

    name: str
    help: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[dict[str, Any]], Any]
    interrupted: str = NOTHING


COMMANDS = (
    Command('finetune', 'fine-tune a model on images, or on embedded digits', finetune.add_arguments, finetune.run),
    Command('evaluate', 'measure accuracy and speed by number of patches', evaluate.add_arguments, evaluate.run),
    Command('predict', 'name what is in images, and where the model looked', predict.add_arguments, predict.run),
    Command('show', 'draw where a model looks in images', show.add_arguments, show.run),
    Command('export', 'export a model to ONNX or torch.export, and check it', export.add_arguments, export.run),
    Command('push', 'push a model to the Hugging Face Hub, with a card', push.add_arguments, push.run, PUSHED),
    Command('run', "run a script, such as timm's train.py, with our models", run.add_arguments, run.run),
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
    for each in COMMANDS:
        command = commands.add_parser(each.name, help=each.help, description=f'{each.help[0].upper()}{each.help[1:]}.')
        each.add(command)
        command.argument_default = argparse.SUPPRESS
        module = 'Python module to import first, such as one with a transform family of your own'
        command.add_argument('--import', action=_Import, metavar='MODULE', help=module)
        command.add_argument('--debug', action='store_true', help='show where an error arose, with its traceback')
        command.set_defaults(command=each)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 2 for bad input, 1 for work that failed, 130 for Ctrl-C."""
    installed = Path(sys.argv[0]).stem == PROGRAM
    given = vars(make_parser(PROGRAM if installed else 'python -m timm_apvit').parse_args(arguments))
    command, debug = given.pop('command'), given.pop('debug', False)
    if command.name == 'run':  # the errors of the script are its own
        return int(command.run(given))
    try:
        return int(command.run(given) or 0)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        status, text = 1, f'error: {explain(error)}'
        if isinstance(error, KeyboardInterrupt):
            status, text = 130, command.interrupted
        elif isinstance(error, RefusedError):
            status = 2
        elif isinstance(error, FailedError):
            status, text = error.status, f'error: {error}' if error.status == 1 else str(error)
        sys.stderr.write(f'{text}\n' if text else '')
        return status


if __name__ == '__main__':
    sys.exit(main())

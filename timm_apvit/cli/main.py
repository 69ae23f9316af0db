"""The command line: ``timm-apvit COMMAND``, or ``python -m timm_apvit COMMAND``. Errors become a line here.

A command is prepared, in which bad input shows, and then does its work.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from timm_apvit import __version__
from timm_apvit.cli import demo, evaluate, export, finetune, predict, push, run, show
from timm_apvit.cli.completion import add_completion_argument
from timm_apvit.failures import FailedError, explain

PROGRAM = 'timm-apvit'
NOTHING = 'interrupted; nothing was written'
PUSHED = 'interrupted; the repository has the files of before, or all of the new ones'
FEWER = 'lower --batch-size, --num-patches or --img-size, or add --amp bfloat16'
BAD_INPUT = (ValueError, TypeError, OSError, ImportError)


class Command(NamedTuple):
    """A command.

    Attributes:
        module: of its name, with ``add_arguments(parser)``, and ``prepare(given)`` that checks the arguments, by their
            names, and returns the work.
        help: a line.
        interrupted: what Ctrl-C leaves.
        remedy: what takes less memory.
    """

    module: Any
    help: str
    interrupted: str = NOTHING
    remedy: str = ''

    @property
    def name(self) -> str:
        """As one types it."""
        return str(self.module.__name__).rpartition('.')[2]


COMMANDS = (
    Command(finetune, 'fine-tune a model on images, or on embedded digits'),
    Command(evaluate, 'measure accuracy and speed by number of patches', 'interrupted', FEWER),
    Command(
        predict, 'name what is in images, and where the model looked', NOTHING, 'lower --batch-size or --num-patches'
    ),
    Command(show, 'draw where a model looks in images', NOTHING, export.REMEDY),
    Command(demo, 'open a page on which one sees where a model looks', 'the page is closed'),
    Command(export, 'export a model to ONNX or torch.export, and check it'),
    Command(push, 'push a model to the Hugging Face Hub, with a card', PUSHED),
    Command(run, "run a script, such as timm's train.py, with our models"),
)
EXAMPLE = """\
train a small model for two or three minutes, measure it with fewer patches and more, and look where it looks:
  {prog} finetune --output runs/first
  {prog} evaluate runs/first --num-patches 9,16,25
  {prog} show photo.jpg --model runs/first -o patches.png

{prog} COMMAND --help tells more of a command. Exit status: 0; 2 for bad input, 1 for work that failed, 130 for Ctrl-C.
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
        command.argument_default = argparse.SUPPRESS  # only what is given
        each.module.add_arguments(command)
        module = 'Python module to import first, such as one with a transform family of your own'
        command.add_argument('--import', action=_Import, metavar='MODULE', help=module)
        command.add_argument('--debug', action='store_true', help='show where an error arose, with its traceback')
        command.set_defaults(command=each, parser=command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 2 for bad input, 1 for work that failed, 130 for Ctrl-C."""
    installed = Path(sys.argv[0]).stem == PROGRAM
    parsed, unknown = make_parser(PROGRAM if installed else 'python -m timm_apvit').parse_known_args(arguments)
    given = vars(parsed)
    command, parser, debug = given.pop('command'), given.pop('parser'), given.pop('debug', False)
    if unknown:
        near = get_close_matches(unknown[0].partition('=')[0], parser._option_string_actions, n=1)
        parser.error(f'unrecognized arguments: {" ".join(unknown)}' + f'; did you mean {" ".join(near)}?' * bool(near))
    given.pop('import', None)
    work: Callable[[], Any] | None = None
    try:
        work = command.module.prepare(given)
        if command.name != 'run':
            work()
            return 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        return _told(error, command, prepared=work is not None)
    work()  # a script, whose errors are its own
    return 0


def _told(error: BaseException, command: Command, prepared: bool) -> int:
    """Tell of an error in a line, and return the exit status."""
    rank = int(os.environ.get('RANK', '0'))
    if isinstance(error, KeyboardInterrupt):
        text, status = str(error) or command.interrupted, getattr(error, 'status', 130)
        sys.stderr.write(f'{text}\n' * (rank == 0))
        return int(status)
    text = str(error) if isinstance(error, FailedError) else explain(error, command.remedy)
    who = f'process {rank}: ' if rank else ''
    sys.stderr.write(f'error: {who}{text}\n')
    return 2 if isinstance(error, BAD_INPUT) and not prepared else 1

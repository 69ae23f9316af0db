"""Completion of the command line by a shell, which shtab writes."""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

SHELLS = ('bash', 'zsh', 'tcsh')
# Metavars of what may be a file or a folder.
_PATHS = {'DATA', 'DIR', 'FILE', 'FILE.csv', 'FILE.gif', 'IMAGE', 'MODEL', 'NAME|DIR|FILE|self', 'PATH', 'SCRIPT'}


def add_completion_argument(parser: argparse.ArgumentParser, complete: Callable[[], argparse.ArgumentParser]) -> None:
    """Add ``--print-completion`` to a parser; ``complete`` makes that of the program to complete."""

    class PrintCompletion(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, option: Any = None) -> None:
            try:
                import shtab
            except ModuleNotFoundError:
                parser.error("completion needs shtab: pip install 'timm-apvit[completion]'")
            completed = complete()
            for action in actions_of(completed):
                if action.metavar in _PATHS:
                    setattr(action, 'complete', shtab.FILE)  # noqa: B010  shtab reads an attribute that mypy does not know
            sys.stdout.write(shtab.complete(completed, shell) + '\n')
            parser.exit()

    parser.add_argument(
        '--print-completion',
        action=PrintCompletion,
        choices=SHELLS,
        default=argparse.SUPPRESS,  # commands take all that is given for their own options
        help='print what lets a shell complete commands, options and files, and exit',
    )


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions_of(command)

"""The command that runs a Python script, such as timm's ``train.py``, with our models registered."""

import argparse
import sys
import types
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any


class Arguments(list[str]):
    """A ``sys.argv`` whose unpickling imports this package.

    multiprocessing sends ``sys.argv`` to each process that it spawns, before the process runs the script anew and
    unpickles its work: so our models are registered there too.
    """

    def __reduce__(self) -> tuple[type['Arguments'], tuple[list[str]]]:
        return Arguments, (list(self),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to a parser."""
    # One argument of both: a second one would not get a '--' that comes first.
    parser.add_argument(
        'script', metavar='SCRIPT', nargs=argparse.PARSER, help='Python file, and the arguments that it is to get'
    )


def prepare(given: dict[str, Any]) -> Callable[[], None]:
    """Prepare to run the script as Python would."""
    file, *arguments = given['script']
    path = Path(file)
    if not path.is_file():
        what = 'a folder' if path.is_dir() else 'which does not exist'
        raise FileNotFoundError(f'expected the file of a Python script, got {file!r}, {what}')
    return lambda: run_script(file, arguments)


def run_script(file: str, arguments: list[str]) -> None:
    """Run a file as ``python FILE ARGUMENTS`` does, in this process, which becomes the script's.

    As there, the script is the module ``__main__``, its folder comes first in ``sys.path``, an error shows the
    script's own frames alone, and ``sys.exit`` ends the process.
    """
    path = str(Path(file).absolute())
    module = types.ModuleType('__main__')
    vars(module).update(__file__=path, __loader__=SourceFileLoader('__main__', path), __cached__=None)
    # multiprocessing has its own name for the main module, by which a process's results are unpickled.
    sys.modules['__main__'] = sys.modules['__mp_main__'] = module
    sys.argv = Arguments([file, *arguments])
    if not getattr(sys.flags, 'safe_path', False):  # Python >= 3.11
        sys.path[0] = str(Path(file).resolve().parent)
    try:
        exec(compile(Path(path).read_bytes(), path, 'exec', dont_inherit=True), vars(module))
    except BaseException as error:
        traceback = error.__traceback__.tb_next if error.__traceback__ is not None else None
        show = sys.excepthook
        sys.excepthook = lambda kind, value, _: show(kind, value.with_traceback(traceback), traceback)
        raise

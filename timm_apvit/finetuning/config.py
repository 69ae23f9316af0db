"""Configuration files: the options of a run, in YAML or JSON, by the names that they have on the command line."""

import argparse
import difflib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from timm_apvit import __version__
from timm_apvit.failures import first_line
from timm_apvit.finetuning.checkpoints import CONFIG_FILE
from timm_apvit.finetuning.options import CHANGEABLE_OPTIONS, REMOVED_OPTIONS, RUNTIME_OPTIONS, Options, add_arguments
from timm_apvit.finetuning.parsing import flag, format_budget

NAMES = tuple(field.name for field in fields(Options) if field.name != 'resume')


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def config_text(options: Options) -> str:
    """The options that make a run what it is, as a configuration file that repeats it.

    Raises:
        TypeError: a file cannot hold an argument of the model.
    """
    values = {name: value for name, value in asdict(options).items() if name not in RUNTIME_OPTIONS}
    if values['num_patches'] is not None:
        values['num_patches'] = ','.join(map(format_budget, values['num_patches']))
    text = yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False, default_flow_style=None, width=120)
    return (
        f'# Written by timm-apvit {__version__}. It repeats the run:\n'
        f'#     python -m timm_apvit finetune --config {CONFIG_FILE} --output NEW\n'
        f'# null: what the model, the data or timm have of their own.\n{text}'
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Returns:
        Options as the command line would give them; None: the file has null for it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not readable, has unknown names, or a value that its option does not take.
    """
    if not path.is_file():
        raise FileNotFoundError(f'expected a configuration file, got {str(path)!r}, which is not a file')
    try:
        text = path.read_text()
        values = json.loads(text) if path.suffix == '.json' else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f'expected YAML or JSON, got a damaged {path}: {first_line(error)}') from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f'expected names of options and their values in {path}, got {type(values).__name__}')
    named = {name.replace('-', '_'): value for name, value in values.items()}
    if unknown := sorted(set(named) - set(NAMES) - REMOVED_OPTIONS.keys()):
        raise ValueError(f'expected names of options in {path}, got {", ".join(map(_suggest, unknown))}')
    parser = _Parser(add_help=False, allow_abbrev=False)
    add_arguments(parser)
    try:
        return {name: None if value is None else _parsed(parser, name, value) for name, value in named.items()}
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def with_config(given: dict[str, Any]) -> dict[str, Any]:
    """Options of the command line with those of its ``config``, if it has one; where both say something it wins.

    Raises:
        FileNotFoundError, ValueError: as for `read_config`, or a run is resumed, which has its own.
    """
    own = {name: value for name, value in given.items() if name != 'config'}
    if given.get('config') is None:
        return own
    if own.get('resume') is not None:
        raise ValueError(f'expected --config or --resume, which takes its own {CONFIG_FILE}, got both')
    read = {name: value for name, value in read_config(Path(given['config'])).items() if value is not None}
    both = {'model_kwargs': {**read.get('model_kwargs', {}), **own.get('model_kwargs', {})}}
    return {**read, **own, **(both if both['model_kwargs'] else {})}


def resumed_options(directory: Path, given: dict[str, Any]) -> Options:
    """Options of a run with those given now, which must not contradict it.

    Raises:
        FileNotFoundError: not the directory of a run.
        ValueError: its options are not readable, those of another version, or differ from those given.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f'expected the folder of a run, which holds {CONFIG_FILE}, got {str(directory)!r}')
    saved = read_config(path)
    if missing := sorted(set(NAMES) - set(saved) - RUNTIME_OPTIONS):
        raise ValueError(f'expected the options of a run in {path}, got none for {", ".join(missing)}')
    free = RUNTIME_OPTIONS | CHANGEABLE_OPTIONS
    differing = [name for name in given if name not in free and not _agree(saved[name], given[name])]
    if differing:
        texts = [f'{flag(name)} {_shown(given[name])} (the run has {_shown(saved[name])})' for name in differing]
        raise ValueError(f'expected the options of the run that is resumed, got {", ".join(texts)}')
    own = {name: value for name, value in saved.items() if value is not None and name not in RUNTIME_OPTIONS}
    return Options(**{**own, **{name: value for name, value in given.items() if name in free}})


def _agree(saved: Any, given: Any) -> bool:
    """Whether a given option is the saved one; of arguments of the model, those that are given."""
    saved, given = json.loads(json.dumps([saved, given]))
    if isinstance(given, dict):
        return all(name in saved and saved[name] == value for name, value in given.items())
    return bool(saved == given)


def _shown(value: Any) -> str:
    """The value of an option as people give it."""
    return ','.join(map(format_budget, value)) if isinstance(value, tuple) else str(value)


def _suggest(name: str) -> str:
    """An unknown name, and the known ones that are nearest."""
    nearest = difflib.get_close_matches(name, NAMES, cutoff=0.5)
    return f'{name!r}' + (f' (did you mean {" or ".join(nearest)}?)' if nearest else '')


def _parsed(parser: argparse.ArgumentParser, name: str, value: Any) -> Any:
    """The value of an option out of a file, parsed as on the command line."""
    if name == 'data':
        if not isinstance(value, str):
            raise ValueError(f'expected data to be a folder or the name of a dataset, got {value!r}')
        return value
    option = flag(name)
    if isinstance(value, bool):
        parser.parse_args([option])  # which raises unless it is a flag
        return value
    if isinstance(value, dict):
        words = [option, *(f'{key}={_tuples(item)!r}' for key, item in value.items())] if value else []
    elif isinstance(value, list) and name != 'num_patches':
        words = [option, *map(str, value)]
    else:
        words = [f'{option}={_text(value)}']
    parsed = vars(parser.parse_args(words))
    if not parsed.keys() <= {name}:
        raise ValueError(f'expected one value for {name}, got {value!r}')
    return parsed.get(name, {})


def _text(value: Any) -> str:
    """A value as the command line has it; a list is one of budgets."""
    if not isinstance(value, list):
        return str(value)
    return ','.join('x'.join(map(str, each)) if isinstance(each, list) else str(each) for each in value)


def _tuples(value: Any) -> Any:
    """A value of a file, with tuples for its lists, as arguments of models have them."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value

"""Configuration files: the settings of a run, in YAML or JSON, by the names that they have on the command line."""

import argparse
import difflib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from timm_apvit import __version__
from timm_apvit.failures import one_line
from timm_apvit.finetuning.settings import CONFIG_FILE, FIELDS, REMOVED, SAVED, Settings
from timm_apvit.finetuning.values import flag, format_budget

# Where data and classes lie may change when a run goes on, if what lies there does not.
MOVABLE = ('data', 'data_dir', 'class_map')


def config_text(settings: Settings) -> str:
    """The settings that make a run what it is, as a configuration file that repeats it."""
    values = {name: value for name, value in asdict(settings).items() if name in SAVED}
    if budgets := values['num_patches']:
        values['num_patches'] = budgets[0] if isinstance(budgets[0], dict) else ','.join(map(format_budget, budgets))
    written = yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False, default_flow_style=None, width=120)
    return (
        f'# Written by timm-apvit {__version__}. It repeats the run:\n'
        f'#     timm-apvit finetune --config {CONFIG_FILE} --output NEW\n'
        f'# null: what the model, the data or timm have of their own.\n{written}'
    )


def read_mapping(path: Path) -> dict[str, Any]:
    """Read names and their values from a YAML or JSON file."""
    if not path.is_file():
        raise FileNotFoundError(f'expected a configuration file, got {str(path)!r}, which is not a file')
    try:
        written = path.read_text(encoding='utf-8-sig')
        values = json.loads(written) if path.suffix == '.json' else yaml.safe_load(written)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f'expected YAML or JSON, got a damaged {path}: {one_line(error)}') from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        found = 'nothing' if values is None else type(values).__name__
        raise ValueError(f'expected names of options and their values in {path}, got {found}')
    return values


def read_config(path: Path) -> dict[str, Any]:
    """Read settings from a file, checked as those of the command line are; None: the file has null."""
    named = {name.replace('-', '_'): value for name, value in read_mapping(path).items()}
    if removed := [name for name in named if name in REMOVED and named[name] not in (None, False)]:
        raise ValueError(f'{path}: {flag(removed[0])} was removed: {REMOVED[removed[0]]}')
    if unknown := sorted(named.keys() - FIELDS.keys() - REMOVED.keys() | named.keys() & {'resume'}):
        raise ValueError(f'expected names of options in {path}, got {", ".join(map(_suggest, unknown))}')
    return {name: _read(path, name, value) for name, value in named.items() if name in FIELDS}


def _read(path: Path, name: str, value: Any) -> Any:
    """A value of a file, as the command line would give it."""
    about = FIELDS[name].metadata
    several = about['argparse'].get('nargs')
    try:
        if value is None or several is None:
            return None if value is None else about['kind'](value)
        if not isinstance(value, list) or (isinstance(several, int) and len(value) != several):
            length = 'values' if several == '+' else several
            raise argparse.ArgumentTypeError(f'expected a list of {length}, got {value!r}')
        return [about['kind'](each) for each in value]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f'{path}: {name}: {error}') from None


def with_config(given: dict[str, Any]) -> dict[str, Any]:
    """Options of the command line with those of its ``config``, if it has one; where both say something it wins."""
    own = {name: value for name, value in given.items() if name != 'config'}
    if 'model_kwargs' in own:
        own['model_kwargs'] = dict(own['model_kwargs'])  # of pairs, on the command line
    if given.get('config') is None:
        return own
    if own.get('resume') is not None:
        raise ValueError(f'expected --config or --resume, which takes its own {CONFIG_FILE}, got both')
    read = {name: value for name, value in read_config(Path(given['config'])).items() if value is not None}
    kwargs = {**read.get('model_kwargs', {}), **own.get('model_kwargs', {})}
    return {**read, **own, **({'model_kwargs': kwargs} if kwargs else {})}


def resumed_settings(directory: Path, given: dict[str, Any]) -> Settings:
    """Settings of a run with those given now, which must not contradict it."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f'expected the folder of a run, which holds {CONFIG_FILE}, got {str(directory)!r}')
    saved = read_config(path)
    if not saved.get('model'):
        raise ValueError(f'expected the options of a run in {path}, got none for model')
    own = {name: value for name, value in saved.items() if value is not None and name in SAVED}
    settings = Settings(**own)  # options that are newer than the run have their defaults
    free = [name for name in given if FIELDS[name].metadata['resume'] is not None or name in MOVABLE]
    differing = [name for name in given if name not in free and not _agree(getattr(settings, name), given[name])]
    if differing:
        texts = [f'{flag(n)} {_shown(n, given[n])} (the run has {_shown(n, getattr(settings, n))})' for n in differing]
        raise ValueError(f'expected the options of the run that is resumed, got {", ".join(texts)}')
    return Settings(**{**own, **{name: given[name] for name in free}})


def run_folder(name: str) -> Path:
    """The folder that a model's name would be if it stands for a run."""
    return Path(name.removeprefix('local-dir:'))


def settings_of_run(name: str) -> Settings | None:
    """Settings of the run that a model's name stands for; None: it is none."""
    directory = run_folder(name)
    return resumed_settings(directory, {}) if (directory / CONFIG_FILE).is_file() else None


def _agree(saved: Any, given: Any) -> bool:
    """Whether a given option is the saved one; of arguments of the model, those that are given."""
    saved, given = json.loads(json.dumps([saved, given]))
    if isinstance(given, dict):
        return all(name in saved and saved[name] == value for name, value in given.items())
    return bool(saved == given)


def _shown(name: str, value: Any) -> str:
    """The value of an option as people give it."""
    if not isinstance(value, tuple):
        return str(value)
    return ','.join(map(format_budget, value)) if name == 'num_patches' else 'x'.join(map(str, value))


def _suggest(name: str) -> str:
    """An unknown name, and the known ones that are nearest."""
    nearest = difflib.get_close_matches(name, FIELDS, cutoff=0.5)
    return f'{name!r}' + (f' (did you mean {" or ".join(nearest)}?)' if nearest else '')

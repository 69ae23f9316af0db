"""Options as argparse takes them: the settings of a run, and those that several commands share."""

import argparse
from typing import Any

import torch

from timm_apvit.finetuning.models import MODEL_HELP, load_model, load_weights
from timm_apvit.finetuning.processes import check_device, default_device
from timm_apvit.finetuning.settings import CONFIG_FILE, FIELDS, REMOVED, RUNNING
from timm_apvit.finetuning.values import boolean, flag, mapping, number, parse_budget, parse_key_value

BATCH_SIZE = 64
# Options of commands that load a model, where they are not those of a run.
SHARED: dict[str, dict[str, Any]] = {
    'checkpoint': {'metavar': 'FILE', 'help': 'weights for a registered model (default: its pretrained ones)'},
    'num_patches': {
        'type': parse_budget,
        'metavar': 'N',
        'help': "number of patches, or GHxGW (default: the model's own)",
    },
    'batch_size': {'type': number(int, 1), 'help': f'(default: {BATCH_SIZE}; it does not change the result)'},
    'workers': {'type': number(int, 0), 'help': 'processes that load data (default: 0, to leave the CPU to models)'},
}


def add_shared(parser: Any, *names: str) -> None:
    """Add options that commands share, by the names of settings, to a parser."""
    for name in names:
        about = FIELDS[name].metadata
        parser.add_argument(flag(name), **SHARED.get(name, {'type': about['kind'], **about['argparse']}))


def add_model(parser: Any) -> None:
    """Add ``--model``, which was ``--checkpoint``."""
    parser.add_argument('--model', '--checkpoint', dest='model', required=True, metavar='MODEL', help=MODEL_HELP)


def load(given: dict[str, Any], any_vit: bool = False) -> Any:
    """The model that options name, in eval mode on its device."""
    device = check_device(given.get('device') or default_device(), given.get('amp'))
    if given.get('threads') is not None:
        torch.set_num_threads(given['threads'])
    name, file = given['model'], given.get('checkpoint')
    model = load_model(name, any_vit) if file is None else load_weights(name, file)
    return model.to(device).eval()


def add_settings(parser: argparse.ArgumentParser, names: list[str] | None = None) -> None:
    """Add settings, or some of them, to a parser."""
    groups: dict[str, Any] = {'': parser}
    for name in FIELDS if names is None else names:
        about = FIELDS[name].metadata
        group, kind, options = about['group'], about['kind'], dict(about['argparse'])
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if kind is boolean:
            options['action'] = 'store_true' if name.startswith('no_') else argparse.BooleanOptionalAction
        elif kind is mapping:
            options.update(type=parse_key_value, action='extend', nargs='+')
        elif name == 'data':
            options.update(type=kind, nargs='?', metavar='DATA')
        else:
            options['type'] = kind
        groups[group].add_argument(name if name == 'data' else flag(name), **options)
    if names is None:
        groups[RUNNING].add_argument(
            '--config',
            metavar='FILE',
            help='YAML or JSON with options by their names, such as batch_size: 64; those given here win; each run '
            f'writes a {CONFIG_FILE} that repeats it (default: none)',
        )
        for name, instead in REMOVED.items():
            parser.add_argument(flag(name), nargs='?', action=_Removed, const=instead, help=argparse.SUPPRESS)


class _Removed(argparse.Action):
    """An option of earlier versions: refused with what stands in its place, its ``const``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.error(f'{option_string} was removed: {self.const}')

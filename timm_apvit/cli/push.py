"""The push command: a run, or a saved model, to the Hub, with what the run knows of it on the model card."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from timm_apvit.failures import one_line
from timm_apvit.finetuning.config import read_mapping
from timm_apvit.finetuning.models import folder_of
from timm_apvit.finetuning.report import FIXED, SUMMARY, display_name
from timm_apvit.finetuning.settings import CONFIG_FILE
from timm_apvit.finetuning.sources import is_path
from timm_apvit.hub.access import check_repo_id
from timm_apvit.hub.card import PICTURE, CardDetails
from timm_apvit.hub.pushing import Pushed, push_to_hub
from timm_apvit.results import METRICS, check_results, metric_in

RESULTS_FILE = 'evaluation.json'
HUB_DATASETS = ('hfds/', 'hfids/')
OPTIONS = ('private', 'revision', 'create_pr', 'token', 'commit_message', 'overwrite_card')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    parser.add_argument('directory', metavar='DIR', help='folder of a run (its best model), or of save_pretrained')
    parser.add_argument('repo_id', metavar='REPO_ID', help='NAMESPACE/NAME; made if it does not exist')
    add = parser.add_argument_group('repository').add_argument
    add('--private', action='store_true', help="make it private, if it is new (default: the Hub's own, public)")
    add('--revision', metavar='BRANCH', help='push to this branch, made if it does not exist (default: main)')
    add('--create-pr', action='store_true', help='open a pull request (default: push)')
    add('--token', help='of the Hub (default: HF_TOKEN, or that of hf auth login, which no list of processes shows)')
    add('--commit-message', metavar='TEXT', help='(default: the model and its number of patches)')
    add = parser.add_argument_group('model card').add_argument
    add('--overwrite-card', action='store_true', help='replace a README.md that is there (default: keep it)')
    add(
        '--results',
        metavar='FILE',
        help=f'what evaluate --json wrote, for a table of accuracy and speed (default: DIR/{RESULTS_FILE} if it is '
        "there, or else the accuracy of the run's best epoch)",
    )
    add('--base-model', metavar='REPO_ID', help='of the source weights (default: where --pretrained took them from)')
    add('--license', metavar='ID', help='such as apache-2.0 (default: that of the source weights, if it is known)')
    add('--dataset', metavar='REPO_ID', action='append', help='on the Hub, of the training (default: of hfds/, hfids/)')
    add(
        '--picture',
        action=argparse.BooleanOptionalAction,
        help='show where the model looks, in 8 test images (default: if the run has it; --no-picture keeps them to '
        'yourself, and with --overwrite-card removes those that are there, but for the history of the repository)',
    )


def prepare(given: dict[str, Any]) -> Callable[[], None]:
    """Check a run or a saved model, which the work pushes, telling what became of it."""
    push = prepared_push(given)
    return lambda: tell(push())


def prepared_push(given: dict[str, Any]) -> Callable[[], Pushed]:
    """What pushes a run, or a folder that ``save_pretrained`` wrote, as options say by their names."""
    check_repo_id(given['repo_id'])
    directory = Path(given['directory'])
    if not directory.is_dir():
        raise FileNotFoundError(f'expected the folder of a run or of a model, got {str(directory)!r}')
    # A run that still trains lets the link name another version.
    model = (folder_of(str(directory)) or directory).resolve()
    options = {name: given[name] for name in OPTIONS if name in given}
    return partial(push_to_hub, model, given['repo_id'], card=card_of(directory, given), **options)


def tell(pushed: Pushed) -> None:
    """Print what became of a push."""
    sys.stdout.write(f'pushed      {pushed.pr_url or pushed.commit_url}\n')
    if not pushed.wrote_card:
        sys.stdout.write('model card  kept the README.md that is there; --overwrite-card replaces it\n')


def push_command(given: dict[str, Any]) -> str:
    """The command that pushes a run again."""
    words = ['python', '-m', 'timm_apvit', 'push', str(given['directory']), given['repo_id']]
    return shlex.join([*words, *['--private'] * ('private' in given), *['--no-picture'] * ('picture' in given)])


def card_of(directory: Path, given: dict[str, Any]) -> CardDetails:
    """What a run, and the options given, say on the model card."""
    file = directory / CONFIG_FILE
    config = read_mapping(file) if file.is_file() else {}
    results = _results(directory, given.get('results'), config)
    evaluated = (results or {}).get('options', {}).get('data')
    picture = directory / PICTURE
    if not given.get('picture', picture.is_file()):
        picture = None  # type: ignore[assignment]
    datasets = given.get('dataset') or [name for name in (_hub_dataset(config.get('data')),) if name]
    return CardDetails(
        base_model=given.get('base_model'),
        license=given.get('license'),
        datasets=tuple(datasets),
        results=results,
        results_dataset=_dataset(evaluated or config.get('data')) if config or evaluated else ('unknown', 'test data'),
        training=_shown(config),
        picture=picture,
    )


def _results(directory: Path, file: str | None, config: dict[str, Any]) -> dict[str, Any] | None:
    """What the model is worth: as evaluated, or else in its best epoch."""
    path = Path(file) if file is not None else directory / RESULTS_FILE
    if file is not None and not path.is_file():
        raise FileNotFoundError(f'expected a file that evaluate --json wrote, got {file!r}, which is not a file')
    if not path.is_file():
        return _summary(directory / SUMMARY, config)
    try:
        results: dict[str, Any] = json.loads(path.read_text())
        check_results(results)
    except ValueError as error:
        raise ValueError(f'expected a file that evaluate --json wrote, got {str(path)!r}: {error}') from error
    return results


def _summary(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The accuracy of a run's best epoch, and of its twin."""
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text())
        own = summary[display_name(str(config.get('model')))]
        budgets = own.get('budgets') or {str(config.get('num_patches') or own['num_patches']): own}
        metric = metric_in(own)
        rows = [
            {'budget': key, 'num_patches': row['num_patches'], metric: row[f'best_{metric}']}
            for key, row in budgets.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f'expected the summary of a run, got a damaged {path}: {one_line(error)}') from error
    note = f'{METRICS[metric]} is that of the best epoch, which was chosen on these very images'
    if FIXED in summary:
        fixed = summary[FIXED]
        note += (
            f'; the same ViT on a fixed grid of {fixed["num_patches"]} patches, trained alike, reached '
            f'{fixed[f"best_{metric}"]:.3f}'
        )
    return {'rows': rows, 'note': note}


def _dataset(data: str | None) -> tuple[str, str]:
    """Identifier and name of a dataset, for the card."""
    if data is None:
        return 'digits', 'digits among clutter, the embedded data of timm-apvit'
    if (name := _hub_dataset(data)) is not None:
        return name, name
    if is_path(data):
        return 'imagefolder', Path(data).resolve().name
    reader, _, name = data.partition('/')
    return name or reader, data


def _hub_dataset(data: str | None) -> str | None:
    """The dataset on the Hub that data come from, if they do."""
    prefix = next((each for each in HUB_DATASETS if data is not None and data.startswith(each)), None)
    if data is None or prefix is None or Path(data.removeprefix(prefix)).exists():
        return None
    try:
        validate_repo_id(data.removeprefix(prefix))
    except HFValidationError:
        return None
    return data.removeprefix(prefix)


def _shown(config: dict[str, Any]) -> str | None:
    """A configuration for the public: without what is not set, and of paths the last name alone."""
    values = {name: _public(value) for name, value in config.items() if value is not None and value != {}}
    text: str = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)
    return text if values else None


def _public(value: Any) -> Any:
    """A value whose paths and addresses do not tell where they lead, or by what password."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if not isinstance(value, str):
        return value
    scheme, separator, _ = value.partition('://')
    if separator or value.startswith('pipe:'):
        return f'{scheme.partition(":")[0]}:...'
    head = 'local-dir:' if value.startswith('local-dir:') else ''
    path = value.removeprefix(head)
    return head + Path(path).name if head or Path(path).is_absolute() else value

"""Options of the fine-tuning command: their names, defaults and agreement."""

import argparse
import ast
import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# What trains without any argument: a model small enough for a CPU on images that need no network.
EMBEDDED_MODEL = 'test_apvit'
EMBEDDED_IMG_SIZE = 112
EMBEDDED_NUM_PATCHES = (4, 4)
# Patches that only move read 0.66 and 0.71 of the digits after 6 epochs, those that also change in size 0.64.
EMBEDDED_TRANSFORM = 'translation'
EMBEDDED_MODEL_KWARGS: dict[str, Any] = {
    'embed_dim': 128,
    'depth': 4,
    'num_heads': 4,
    'max_shift': 1.5,
    # Without these three a ViT this small takes several times as long to learn anything at all from scratch.
    'class_token': False,
    'global_pool': 'avg',
    'weight_init': 'jax',
}
# These change where and how fast a run computes, not what: --resume takes them anew.
RUNTIME_OPTIONS = frozenset({'output', 'resume', 'workers', 'device', 'threads'})


@dataclass(frozen=True)
class Options:
    """Options of the command; None stands for a default that depends on others (`with_defaults`)."""

    data: str | None = None
    model: str | None = None
    pretrained: bool = False
    checkpoint: str | None = None
    num_patches: int | tuple[int, int] | None = None
    transform: str | None = None
    img_size: int | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    twin: bool | None = None
    epochs: int | None = None
    batch_size: int = 64
    lr: float | None = None
    layer_decay: float | None = None
    weight_decay: float = 0.05
    warmup: float | None = None
    samples: int = 8_000
    test_samples: int = 1_000
    seed: int = 0
    workers: int | None = None
    threads: int | None = None
    device: str | None = None
    output: str | None = None
    resume: str | None = None


def parse_num_patches(text: str) -> int | tuple[int, int]:
    """Parse ``N`` or ``GHxGW``."""
    parts = text.lower().split('x')
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f'expected N or GHxGW, integers >= 1, got {text!r}')
    numbers = [int(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _parse_model_kwarg(text: str) -> tuple[str, Any]:
    """Parse ``key=value``, the value a Python literal or else a string."""
    name, equals, value = text.partition('=')
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f'expected key=value, got {text!r}')
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Any:
    """Make a parser of a bounded number, for argparse."""

    def parse(text: str) -> Any:
        bounds = f'{"above" if open_low else ">="} {low:g}' + (f' and <= {high:g}' if high < math.inf else '')
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)) or (open_low and value == low):
            what = 'an integer' if kind is int else 'a number'
            raise argparse.ArgumentTypeError(f'expected {what} {bounds}, got {text!r}')
        return value

    return parse


class _ModelKwargs(argparse.Action):
    """Collect key=value pairs into one dictionary."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), **dict(values)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser, which then returns only those that are given."""
    parser.argument_default = argparse.SUPPRESS
    counted, positive, rate = _number(int, 1), _number(float, 0, open_low=True), _number(float, 0)
    parser.add_argument(
        'data',
        nargs='?',
        metavar='DATA',
        help='folder with train/ and val/ (or validation/, test/), each with one folder of images per class; '
        'default: real digits among clutter, which need no network',
    )

    add = parser.add_argument_group('model').add_argument
    add('--model', metavar='NAME', help=f'apvit_small, ... (default: apvit_small; without DATA {EMBEDDED_MODEL})')
    add('--pretrained', action='store_true', help='start from the pretrained weights of the ViT')
    add('--checkpoint', metavar='FILE', help='start from the weights in a file, of a ViT or an APViT')
    add('--num-patches', type=parse_num_patches, metavar='N', help="how many, or GHxGW (default: the model's own)")
    add('--transform', metavar='NAME', help="what a patch may do: translation, scale, ... (default: the model's own)")
    add('--img-size', type=counted, metavar='PIXELS', help="side of the images (default: the model's own)")
    add(
        '--model-kwargs',
        type=_parse_model_kwarg,
        action=_ModelKwargs,
        nargs='+',
        metavar='KEY=VALUE',
        help='further arguments of the model, such as max_shift=2.0 drop_path_rate=0.1',
    )
    add(
        '--twin',
        action=argparse.BooleanOptionalAction,
        help='also train the same ViT with as many patches on a fixed grid, on the image made smaller, and compare '
        '(default: without DATA)',
    )

    add = parser.add_argument_group('training').add_argument
    add('--epochs', type=counted, help='(default: 10; without DATA 6)')
    add('--batch-size', type=counted, help='(default: 64)')
    add('--lr', type=positive, help='peak learning rate (default: 1e-3; without DATA 2e-3; from given weights 2e-4)')
    add(
        '--layer-decay',
        type=_number(float, 0, 1, open_low=True),
        help='factor of the learning rate from a block to the one below (default: 1; from given weights 0.75)',
    )
    add('--weight-decay', type=rate, help='(default: 0.05)')
    add('--warmup', type=rate, metavar='EPOCHS', help='epochs of rising learning rate (default: a tenth of all)')
    add('--seed', type=_number(int, 0), help='(default: 0)')
    add('--samples', type=counted, help='embedded images per epoch (default: 8000)')
    add('--test-samples', type=counted, help='embedded test images (default: 1000)')

    add = parser.add_argument_group('running').add_argument
    add('--output', metavar='DIR', help='a new folder for checkpoints, metrics and picture (default: runs/MODEL-TIME)')
    add('--resume', metavar='DIR', help='continue the interrupted run in this folder, with its own options')
    add('--workers', type=_number(int, 0), help='processes that load data (default: 0; with DATA up to 8)')
    add('--threads', type=counted, help="of computation on the CPU (default: PyTorch's own)")
    add('--device', help='cpu, cuda, cuda:1, ... (default: cuda if there is one)')


def to_json(options: Options) -> dict[str, Any]:
    """The options that make a run what it is."""
    return {name: value for name, value in asdict(options).items() if name not in RUNTIME_OPTIONS}


def from_json(saved: dict[str, Any], given: dict[str, Any]) -> Options:
    """Options of a saved run with those given now, which must not contradict it.

    Raises:
        ValueError: an option differs from the run's own, or is unknown.
    """
    known = {f.name for f in fields(Options)}
    if unknown := sorted(set(saved) - known):
        raise ValueError(f'expected options of this version, got the unknown {", ".join(unknown)}')
    if missing := sorted(known - set(saved) - RUNTIME_OPTIONS):
        raise ValueError(f'expected the options of a run, got none for {", ".join(missing)}')
    differing = [
        name for name, value in given.items() if name not in RUNTIME_OPTIONS and not _agree(saved[name], value)
    ]
    if differing:
        texts = [f'{_flag(name)} {given[name]} (the run has {saved.get(name)})' for name in differing]
        raise ValueError(f'expected the options of the run that is resumed, got {", ".join(texts)}')
    runtime = {name: value for name, value in given.items() if name in RUNTIME_OPTIONS}
    return Options(**{**_tuples(saved), **runtime})


def _tuples(value: Any) -> Any:
    """What JSON read back, with tuples for its lists."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _agree(saved: Any, given: Any) -> bool:
    """Whether a given option is the saved one; of arguments of the model, those that are given."""
    given = json.loads(json.dumps(given))
    if isinstance(given, dict):
        return all(name in saved and saved[name] == value for name, value in given.items())
    return bool(saved == given)


def _flag(name: str) -> str:
    return 'DATA' if name == 'data' else '--' + name.replace('_', '-')

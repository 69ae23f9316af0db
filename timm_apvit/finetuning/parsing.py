"""Parsers of the values that options take."""

import argparse
import ast
import json
import math
from typing import Any

from timm_apvit.patching.anchors import check_num_patches, resolve_layout

EXAMPLE = '{"name": "coarse_fine", "coarse": 4, "fine": 7}'

Budget = int | tuple[int, int] | dict[str, Any]
"""A number of patches: N, ``(gh, gw)``, or a layout by name."""


def parse_budget(text: str) -> int | tuple[int, int]:
    """Parse ``N`` or ``GHxGW``."""
    parts = text.lower().split('x')
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f'expected N or GHxGW, integers >= 1, got {text!r}')
    numbers = [int(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def parse_num_patches(text: str) -> tuple[Budget, ...]:
    """Parse one budget, or several between commas, such as ``16,49,7x14``; or a layout as a JSON mapping."""
    if text.lstrip().startswith('{'):
        try:
            return (check_num_patches(json.loads(text)),)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f'expected a layout such as {EXAMPLE}, got {text!r}: {error}') from None
    budgets = tuple(parse_budget(part.strip()) for part in text.split(','))
    counts = [count(budget) for budget in budgets]
    if len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f'expected numbers of patches that all differ, got {text!r}')
    return budgets


def count(budget: Budget) -> int:
    """The number of patches of a budget."""
    return resolve_layout(budget, (1, 1)).num_patches


def format_budget(budget: Budget) -> str:
    """A budget as it is given: ``N``, ``GHxGW``, or JSON."""
    if isinstance(budget, dict):
        return json.dumps(budget)
    return str(budget) if isinstance(budget, int) else f'{budget[0]}x{budget[1]}'


def parse_model_kwarg(text: str) -> tuple[str, Any]:
    """Parse ``key=value``, the value a Python literal or else a string."""
    name, equals, value = text.partition('=')
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f'expected key=value, got {text!r}')
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False) -> Any:
    """Make a parser of a bounded number, for argparse."""

    def parse(text: str) -> Any:
        upper = f' and {"below" if open_high else "<="} {high:g}' if high < math.inf else ''
        bounds = f'{"above" if open_low else ">="} {low:g}{upper}'
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = low <= value <= high and math.isfinite(value)
        if not inside or (open_low and value == low) or (open_high and value == high):
            what = 'an integer' if kind is int else 'a number'
            raise argparse.ArgumentTypeError(f'expected {what} {bounds}, got {text!r}')
        return value

    return parse


class ModelKwargs(argparse.Action):
    """Collect key=value pairs into one dictionary."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Add the pairs to those of earlier uses of the option."""
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), **dict(values)})


class Removed(argparse.Action):
    """An option of earlier versions: refused with what stands in its place, its ``const``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Refuse it."""
        parser.error(f'{option_string} was removed: {self.const}')


def flag(name: str) -> str:
    """An option as the command line has it."""
    return 'DATA' if name == 'data' else '--' + name.replace('_', '-')

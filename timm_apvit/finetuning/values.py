"""Values of options, as text of the command line or as YAML has them."""

import argparse
import ast
import json
import math
from collections.abc import Callable
from typing import Any

from timm_apvit.patching.anchors import check_num_patches, resolve_layout

EXAMPLE = '{"name": "coarse_fine", "coarse": 4, "fine": 7}'

Budget = int | tuple[int, int] | dict[str, Any]
"""A number of patches: N, ``(gh, gw)``, or a layout by name."""


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False) -> Any:
    """Make a parser of a bounded number."""

    def parse(value: Any) -> Any:
        upper = f' and {"below" if open_high else "<="} {high:g}' if high < math.inf else ''
        bounds = f'{"above" if open_low else ">="} {low:g}{upper}'
        try:
            parsed = kind(value)
            exact = not isinstance(value, bool) and (isinstance(value, str) or parsed == value)
        except (TypeError, ValueError, OverflowError):
            parsed, exact = math.nan, False
        inside = exact and low <= parsed <= high and math.isfinite(parsed)
        if not inside or (open_low and parsed == low) or (open_high and parsed == high):
            what = 'an integer' if kind is int else 'a number'
            raise argparse.ArgumentTypeError(f'expected {what} {bounds}, got {value!r}')
        return parsed

    return parse


def text(value: Any) -> str:
    """A string, of at least a character: a variable of the shell that is not set gives none."""
    if not isinstance(value, str) or not value:
        raise argparse.ArgumentTypeError(f'expected a string that is not empty, got {value!r}')
    return value


def boolean(value: Any) -> bool:
    """True or false, of a file; the command line has flags."""
    if not isinstance(value, bool):
        raise argparse.ArgumentTypeError(f'expected true or false, got {value!r}')
    return value


def one_of(*names: str) -> Callable[[Any], str]:
    """Make a parser of one of some names."""

    def parse(value: Any) -> str:
        if value not in names:
            raise argparse.ArgumentTypeError(f'expected {", ".join(names[:-1])} or {names[-1]}, got {value!r}')
        return str(value)

    parse.choices = names  # type: ignore[attr-defined]
    return parse


def parse_budget(value: Any) -> int | tuple[int, int]:
    """Parse ``N`` or ``GHxGW``."""
    parts = value if isinstance(value, list | tuple) else str(value).lower().split('x')
    numbers = [int(part) if str(part).isdecimal() else 0 for part in parts]
    if not 1 <= len(numbers) <= 2 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f'expected N or GHxGW, integers >= 1, got {value!r}')
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def parse_num_patches(value: Any) -> tuple[Budget, ...]:
    """Parse one budget, or several between commas, such as ``16,49,7x14``; or a layout as a JSON mapping."""
    if isinstance(value, dict) or (isinstance(value, str) and value.lstrip().startswith('{')):
        try:
            return (check_num_patches(json.loads(value) if isinstance(value, str) else value),)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f'expected a layout such as {EXAMPLE}, got {value!r}: {error}') from None
    each = value if isinstance(value, list | tuple) else [part.strip() for part in str(value).split(',')]
    budgets = tuple(parse_budget(part) for part in each)
    counts = [count(budget) for budget in budgets]
    if len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f'expected numbers of patches that all differ, got {value!r}')
    return budgets


def count(budget: Budget) -> int:
    """The number of patches of a budget."""
    return resolve_layout(budget, (1, 1)).num_patches


def format_budget(budget: Budget) -> str:
    """A budget as it is given: ``N``, ``GHxGW``, or JSON."""
    if isinstance(budget, dict):
        return json.dumps(budget)
    return str(budget) if isinstance(budget, int) else f'{budget[0]}x{budget[1]}'


def parse_size(value: Any) -> int | tuple[int, int]:
    """Parse ``PIXELS``, the side of a square, or ``HxW``."""
    try:
        return parse_budget(value)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f'expected PIXELS or HxW, integers >= 1, got {value!r}') from None


def parse_key_value(value: str) -> tuple[str, Any]:
    """Parse ``key=value``, the value a Python literal or else a string."""
    name, equals, literal = value.partition('=')
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f'expected key=value, got {value!r}')
    try:
        return name, ast.literal_eval(literal)
    except (ValueError, SyntaxError):
        return name, literal


def mapping(value: Any) -> dict[str, Any]:
    """Arguments by name, of a file, with tuples for its lists as models have them."""
    if not isinstance(value, dict) or not all(isinstance(name, str) and name.isidentifier() for name in value):
        raise argparse.ArgumentTypeError(f'expected names of arguments and their values, got {value!r}')

    def tuples(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: tuples(each) for key, each in item.items()}
        return tuple(map(tuples, item)) if isinstance(item, list | tuple) else item

    return {name: tuples(item) for name, item in value.items()}


def flag(name: str) -> str:
    """An option as the command line has it."""
    return 'DATA' if name == 'data' else '--' + name.replace('_', '-')

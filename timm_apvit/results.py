"""Results of an evaluation: what a model is worth by its number of patches, checked, and as a table."""

import math
from collections.abc import Mapping
from typing import Any

# Columns of the table of results: key of a row, title, format.
COLUMNS = (
    ('top1', 'top-1', '.3f'),
    ('top5', 'top-5', '.3f'),
    ('loss', 'loss', '.3f'),
    ('multiply_adds', 'M multiply-adds', '.1f'),
)


def check_results(results: Any) -> None:
    """Raise ValueError unless a table can be made of results."""
    rows = results.get('rows') if isinstance(results, Mapping) else None
    if not isinstance(rows, list | tuple) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f'expected results with rows, as evaluate writes them, got {_shortened(results)}')
    for row in rows:
        if not {'budget', 'num_patches', 'top1'} <= row.keys():
            raise ValueError(f'expected rows with budget, num_patches and top1, got {_shortened(row)}')
        speeds = row.get('images_per_second', {})
        if not isinstance(speeds, Mapping):
            raise ValueError(f'expected images_per_second by size of the batch, got {_shortened(speeds)}')
        for key, value in [*((key, row.get(key, 0)) for key, _, _ in COLUMNS), *speeds.items()]:
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f'expected rows with finite numbers, got {key}={value!r} at {row["budget"]} patches')
    for key in ('versions', 'options'):
        if not isinstance(results.get(key, {}), Mapping):
            raise ValueError(f'expected {key} by name, got {_shortened(results[key])}')


def results_table(results: Mapping[str, Any], dataset_name: str) -> str:
    """Accuracy, cost and speed by number of patches, as a Markdown table, and what it was measured on."""
    rows = results['rows']
    columns = [column for column in COLUMNS if all(column[0] in row for row in rows)]
    speeds = [row.get('images_per_second', {}) for row in rows]
    sizes = [size for size in speeds[0] if all(size in each for each in speeds)]
    titles = ['patches', *(title for _, title, _ in columns)]
    titles += ['images/s alone' if size == '1' else f'images/s in batches of {size}' for size in sizes]
    lines = [f'| {" | ".join(titles)} |', '|---' * len(titles) + '|']
    for row, speed in zip(rows, speeds, strict=True):
        cells = [str(row['budget'])]
        cells += [format(row[key] / (1e6 if key == 'multiply_adds' else 1), spec) for key, _, spec in columns]
        cells += [f'{speed[size]:.1f}' for size in sizes]
        lines.append(f'| {" | ".join(cells)} |')
    said = [f'{rows[0]["images"]} images of {dataset_name}' if 'images' in rows[0] else f'On {dataset_name}']
    versions = ', '.join(f'{key} {value}' for key, value in results.get('versions', {}).items())
    threads = f', {results["threads"]} threads' if 'threads' in results else ''
    said += [f'on {results["device"]}{threads}'] if 'device' in results else []
    said += [versions] if versions else []
    said += [str(results[key]) for key in ('counted', 'note') if results.get(key)]
    return '\n'.join(lines) + '\n\n' + '; '.join(said) + '.'


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + '...'

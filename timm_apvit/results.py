"""Results of an evaluation: what a model is worth by its number of patches, checked, and as a table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# What models are compared by, and its title.
METRICS = {'top1': 'top-1', 'map': 'mAP'}
# Columns of the table of results: key of a row, title, format.
COLUMNS = (
    *((metric, title, '.3f') for metric, title in METRICS.items()),
    ('top5', 'top-5', '.3f'),
    ('micro_f1', 'F1', '.3f'),
    ('loss', 'loss', '.3f'),
    ('multiply_adds', 'M multiply-adds', '.1f'),
)


def metric_in(row: Mapping[str, Any], prefix: str = '') -> str:
    """What a row tells that models are compared by: a key of `METRICS`, after a prefix."""
    return next(metric for metric in METRICS if prefix + metric in row)


def check_results(results: Any) -> None:
    """Raise ValueError unless a table can be made of results."""
    rows = results.get('rows') if isinstance(results, Mapping) else None
    if not isinstance(rows, list | tuple) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f'expected results with rows, as evaluate writes them, got {results!r:.80}')
    for row in rows:
        if not ({'budget', 'num_patches'} <= row.keys() and METRICS.keys() & row.keys()):
            raise ValueError(f'expected rows with budget, num_patches, and top1 or map, got {row!r:.80}')
        speeds = row.get('images_per_second', {})
        if not isinstance(speeds, Mapping):
            raise ValueError(f'expected images_per_second by size of the batch, got {speeds!r:.80}')
        for key, value in [*((key, row.get(key, 0)) for key, _, _ in COLUMNS), *speeds.items()]:
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f'expected rows with finite numbers, got {key}={value!r} at {row["budget"]} patches')
    for key in ('versions', 'options'):
        if not isinstance(results.get(key, {}), Mapping):
            raise ValueError(f'expected {key} by name, got {results[key]!r:.80}')


def results_table(results: Mapping[str, Any], dataset_name: str) -> str:
    """Accuracy, cost and speed by number of patches, as a Markdown table, and what it was measured on."""
    titles, rows = results_cells(results['rows'])
    lines = [f'| {" | ".join(titles)} |', '|---' * len(titles) + '|']
    lines += [f'| {" | ".join(cells)} |' for cells in rows]
    images = results['rows'][0].get('images')
    said = [f'{images} images of {dataset_name}' if images is not None else f'On {dataset_name}']
    versions = ', '.join(f'{key} {value}' for key, value in results.get('versions', {}).items())
    threads = f', {results["threads"]} threads' if 'threads' in results else ''
    said += [f'on {results["device"]}{threads}'] if 'device' in results else []
    said += [versions] if versions else []
    said += [str(results[key]) for key in ('counted', 'note') if results.get(key)]
    return '\n'.join(lines) + '\n\n' + '; '.join(said) + '.'


def results_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns that all rows have, and the cells of each row."""
    columns = [column for column in COLUMNS if all(column[0] in row for row in rows)]
    speeds = [row.get('images_per_second', {}) for row in rows]
    sizes = [size for size in speeds[0] if all(size in each for each in speeds)]
    titles = ['model'] if all('model' in row for row in rows) else []
    titles += ['patches', *(title for _, title, _ in columns)]
    titles += ['images/s alone' if size == '1' else f'images/s in batches of {size}' for size in sizes]
    table = []
    for row, speed in zip(rows, speeds, strict=True):
        cells = [*([str(row['model'])] if titles[0] == 'model' else []), str(row['budget'])]
        cells += [format(row[key] / (1e6 if key == 'multiply_adds' else 1), spec) for key, _, spec in columns]
        table.append(cells + [f'{speed[size]:.1f}' for size in sizes])
    return titles, table


def aligned(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: the first column to the left, figures to the right."""
    lines = [list(titles), *map(list, rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(titles))]
    padded = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return '\n'.join(
        '  '.join([line[0].ljust(widths[0]), *cells[1:]]) for line, cells in zip(lines, padded, strict=True)
    )

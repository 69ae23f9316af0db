"""How do time and memory grow? With the number of patches and with the side of the image, of an APViT and its ViT.

    python benchmarks/growth.py [--tokens 16 ... 1024] [--sides 224 ... 4096] [--threads 1] [--output growth.json]

One image. With the number of patches N: of an image of 512 px, beside the ViT on an image that has as many cells. With
the side: 196 patches, beside the ViT with as many, on the image made smaller, and beside the ViT on all of the image,
as far as that fits. Times are medians of rounds in turn; memory is the peak of a process of its own each, less what it
held before. Slopes are those of straight lines through logarithms, of the larger half: 1 is proportional, 2 its square.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from cost import resident, rest_peak
from environment import counted, new_file, write_report
from speed import randomised
from timing import ALLOCATOR, keep_memory, time_in_turns
from torch import Tensor, nn

from timm_apvit.finetuning.baseline import resizing

NAME, VIT, PATCH = 'apvit_small', 'vit_small_patch16_224', 16
SOURCE, FEW = 512, 196
# Side of the largest image that the ViT sees all of: 4,096 tokens.
LARGEST = 1024
LABELS = {'apvit': 'APViT', 'vit': 'ViT, as many tokens', 'whole': 'ViT, all of the image'}


def prepared(who: str, along: str, value: int) -> tuple[nn.Module, Tensor]:
    """A model and its image: along ``'tokens'`` or ``'sides'``."""
    tokens, side = (value, SOURCE) if along == 'tokens' else (FEW, value)
    torch.manual_seed(0)
    if who == 'apvit':
        return randomised(timm.create_model(NAME, num_patches=tokens)).eval(), torch.randn(1, 3, side, side)
    if who == 'whole' or along == 'tokens':
        grid = math.isqrt(tokens) if along == 'tokens' else side // PATCH
        size = (grid * PATCH, -(-tokens // grid) * PATCH if along == 'tokens' else grid * PATCH)
        return timm.create_model(VIT, img_size=size).eval(), torch.randn(1, 3, *size)
    return resizing(timm.create_model(VIT)).eval(), torch.randn(1, 3, side, side)


def contestants(along: str, value: int) -> list[str]:
    """Who is compared."""
    return ['apvit', 'vit', *(['whole'] if along == 'sides' and value <= LARGEST else [])]


def peak(who: str, along: str, value: int) -> float:
    """Peak of a forward in this process, in MiB, weights left out."""
    with torch.inference_mode():
        for name in ('test_vit', 'test_apvit'):  # libraries that load at first use
            timm.create_model(name).eval()(torch.randn(1, 3, 160, 160))
    model, image = prepared(who, along, value)
    before = rest_peak()
    with torch.inference_mode():
        model(image)
    return resident('VmHWM') - before


def measure(along: str, value: int, rounds: int, threads: int) -> dict[str, Any]:
    """Milliseconds and MiB of each."""
    names = contestants(along, value)
    pairs = {who: prepared(who, along, value) for who in names}
    with torch.inference_mode():
        seconds = time_in_turns({who: lambda p=pair: p[0](p[1]) for who, pair in pairs.items()}, rounds)
    row: dict[str, Any] = {along: value}
    for who in names:
        command = [sys.executable, __file__, '--threads', str(threads), '--peak', who, along, str(value)]
        usual = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}  # it gives back what is free
        found = subprocess.run(command, check=True, capture_output=True, text=True, env=usual).stdout
        row[who] = {'milliseconds': round(1000 * statistics.median(seconds[who]), 2), 'mib': round(float(found), 1)}
    return row


def slope(points: list[tuple[float, float]]) -> float:
    """Of a straight line through the logarithms of the larger half of points (x, y)."""
    upper = sorted(points)[len(points) // 2 :] if len(points) > 3 else sorted(points)
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in upper), strict=True)
    return statistics.linear_regression(xs, ys).slope


def slopes(rows: list[dict[str, Any]], along: str) -> dict[str, dict[str, float]]:
    """Of milliseconds and MiB, by who is compared."""
    return {
        who: {
            key: round(slope([(row[along], row[who][key]) for row in rows if who in row and row[who][key] > 0]), 2)
            for key in ('milliseconds', 'mib')
        }
        for who in LABELS
        if sum(who in row for row in rows) > 1
    }


def table(rows: list[dict[str, Any]], along: str, found: dict[str, dict[str, float]]) -> list[str]:
    """The lines of a table, the slopes last."""
    names = list(found)
    first = {'tokens': 'patches', 'sides': 'side, px'}[along]
    lines = [
        f'| {first} | {" | ".join(f"{LABELS[who]}: ms | MiB" for who in names)} |',
        '|---' * (1 + 2 * len(names)) + '|',
    ]
    for row in rows:
        cells = [f'{row[who]["milliseconds"]:.1f} | {row[who]["mib"]:.0f}' if who in row else ' | ' for who in names]
        lines.append(f'| {row[along]:,} | {" | ".join(cells)} |')
    ends = [f'{found[who]["milliseconds"]:.2f} | {found[who]["mib"]:.2f}' for who in names]
    return [*lines, f'| slope | {" | ".join(ends)} |']


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Times and memory, each against the number of patches and the side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout='constrained')
    for axes, (along, rows) in zip(figure.subplots(2, 2), results.items(), strict=True):
        for axis, (key, title) in zip(axes, {'milliseconds': 'ms', 'mib': 'peak MiB'}.items(), strict=True):
            for who, colour in zip(LABELS, ('#D55E00', '#56B4E9', '#009E73'), strict=True):
                points = [(row[along], row[who][key]) for row in rows if who in row]
                if points:
                    axis.loglog(*zip(*points, strict=True), 'o-', color=colour, label=LABELS[who])
            axis.set(xlabel={'tokens': 'patches', 'sides': 'side of the image, px'}[along], ylabel=title)
            values = [row[along] for row in rows]
            axis.set_xticks(values, [f'{value:,}' for value in values])
            axis.minorticks_off()
            axis.yaxis.set_major_formatter('{x:g}')
            axis.grid(alpha=0.3)
    figure.axes[2].legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measure along both, and write tables, a figure and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--tokens', nargs='+', type=counted, default=[16, 36, 64, 144, 256, 576, 1024])
    add('--sides', nargs='+', type=counted, default=[224, 448, 1024, 2048, 4096])
    add('--rounds', type=counted, default=7)
    add('--threads', type=counted, default=1)
    add('--output', type=new_file, default=Path(__file__).parent / 'results' / 'growth.json')
    add('--peak', nargs=3, metavar=('WHO', 'ALONG', 'VALUE'), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        who, along, value = options.peak
        sys.stdout.write(str(peak(who, along, int(value))))
        return
    results: dict[str, list[dict[str, Any]]] = {'tokens': [], 'sides': []}
    lines: list[str] = []
    found = {}
    for along, rows in results.items():
        for value in getattr(options, along):
            rows.append(measure(along, value, options.rounds, options.threads))
            sys.stdout.write(f'{json.dumps(rows[-1])}\n')
            sys.stdout.flush()
        found[along] = slopes(rows, along)
        lines += [*table(rows, along, found[along]), '']
    sys.stdout.write('\n'.join(lines))
    options.output.with_suffix('.md').write_text('\n'.join(lines[:-1]) + '\n')
    draw(results, options.output.with_suffix('.png'))
    write_report(options.output, options.threads, **results, slopes=found)


if __name__ == '__main__':
    if '--peak' not in sys.argv:
        keep_memory()
    main()

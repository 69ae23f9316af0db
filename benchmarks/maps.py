"""What do dense maps cost? Time and memory of four maps beside that of the tokens that they are made of.

    python benchmarks/maps.py [--sides 512 1024] [--threads 1] [--output maps.json]

ViT-S/16 with 784 patches that have moved and zoomed, and one image: `forward_intermediates` for the tokens of four
blocks, and the maps alone that are made of them, in turn.
"""

import argparse
import statistics
import sys
from pathlib import Path

import timm
import torch
from environment import counted, new_file, write_report
from timing import keep_memory, time_in_turns
from torch import nn

import timm_apvit  # noqa: F401  registers the model
from timm_apvit.models.dense import dense_map, splat_weights

PATCHES, BLOCKS = 784, [2, 5, 8, 11]


def measure(side: int, rounds: int) -> dict[str, float]:
    """Medians in milliseconds, the share of the maps, and how many pairs of a patch and a cell there are."""
    model = timm.create_model('apvit_small', num_patches=PATCHES).eval()
    for layer in model.patch_embed.patching.localizer.fields.values():
        nn.init.normal_(layer.weight, std=0.1)
    image, grid = torch.randn(1, 3, side, side), (side // 16, side // 16)
    with torch.inference_mode():
        geometry = model.patch_embed(image).geometry

        def read() -> list[torch.Tensor]:
            found: list[torch.Tensor] = model.forward_intermediates(
                image, BLOCKS, output_fmt='NLC', intermediates_only=True
            )
            return found

        tokens = read()

        def put_back() -> list[torch.Tensor]:
            weights = splat_weights(geometry, grid)
            return [dense_map(each, weights, grid) for each in tokens]

        seconds = time_in_turns({'tokens': read, 'maps': put_back}, rounds)
        pairs = len(splat_weights(geometry, grid).weight)
    tokens_ms, maps_ms = (1e3 * statistics.median(seconds[name]) for name in ('tokens', 'maps'))
    return {
        'side': side, 'tokens_ms': round(tokens_ms, 1), 'maps_ms': round(maps_ms, 2),
        'share': round(maps_ms / tokens_ms, 4), 'pairs': pairs, 'all_pairs': PATCHES * grid[0] * grid[1],
    }  # fmt: skip


def main() -> None:
    """Measure each side, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sides', nargs='+', type=counted, default=[512, 1024])
    parser.add_argument('--rounds', type=counted, default=9)
    parser.add_argument('--threads', type=counted, default=1)
    parser.add_argument('--output', type=new_file, default=Path(__file__).parent / 'results' / 'maps.json')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found = [measure(side, options.rounds) for side in options.sides]
    for each in found:
        sys.stdout.write(f'{each}\n')
    write_report(options.output, options.threads, maps=found)


if __name__ == '__main__':
    keep_memory()
    main()

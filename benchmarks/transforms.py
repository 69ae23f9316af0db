"""What each transform family costs: the time of a forward against that of `similarity`, and of the plain ViT.

    python benchmarks/transforms.py [--model apvit_small] [--batch 8] [--rounds 15] [--output transforms.json]

All take turns, and each is compared with the reference of its own round: a machine that slows down slows both. The
median of these ratios counts, and their quartiles tell how far to trust it.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
from environment import machine, versions
from torch import nn

import timm_apvit

REFERENCE = 'similarity'


def time_in_turns(models: dict[str, nn.Module], image: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of a forward of each model in each round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for round_ in range(rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(image)
                if round_ > 0:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='apvit_small', choices=timm.list_models('*apvit*'))
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--output', type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models = {'ViT': timm.create_model(timm_apvit.vit_name(args.model)).eval()}
    for family in timm_apvit.TRANSFORMS:
        models[family] = timm.create_model(args.model, transform=family).eval()
    image = torch.randn(args.batch, 3, *models['ViT'].patch_embed.img_size)
    seconds = time_in_turns(models, image, args.rounds)

    rows = []
    for name, own in seconds.items():
        ratios = [mine / reference for mine, reference in zip(own, seconds[REFERENCE], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        rows.append({'family': name, 'milliseconds': 1000 * statistics.median(own), 'ratio_quartiles': quartiles})
        low, middle, high = quartiles
        sys.stdout.write(
            f'{name:<18} {rows[-1]["milliseconds"]:>7.0f} ms   {middle:.3f} x {REFERENCE} ({low:.3f} to {high:.3f})\n'
        )
    if args.output:
        setting = {**versions(), **machine(args.threads), 'model': args.model, 'batch': args.batch}
        report = {'command': ' '.join(sys.argv), **setting, 'families': rows}
        args.output.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()
